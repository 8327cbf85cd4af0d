import pytest
import torch

from gnnmd.parallel import Mesh, Ranks


def places(group, gp):
    """Return where a process is and the sums over its two groups; job for the worker pool."""
    mesh = Mesh.of(Ranks(group), gp)
    rank = torch.tensor([mesh.world.rank, 1])
    once = mesh.world.sum(mesh.once(rank, partial=False)).tolist()
    return mesh.replica, mesh.gp.rank, mesh.n_replicas, mesh.gp.sum(rank).tolist(), once


@pytest.mark.parametrize(
    ("gp", "expected"),
    [
        (1, [(r, 0, 4, [r, 1], [6, 4]) for r in range(4)]),
        (2, [(r // 2, r % 2, 2, [4 * (r // 2) + 1, 2], [2, 2]) for r in range(4)]),
        (4, [(0, r, 1, [6, 4], [0, 1]) for r in range(4)]),
    ],
)
def test_neighbouring_ranks_share_graphs_and_count_once(pool, gp, expected):
    assert pool.run(4, places, gp) == expected


def test_replicas_have_equally_many_ranks(pool):
    with pytest.raises(ValueError, match="gp=2 ranks per graph do not divide 1 processes"):
        Mesh.of(Ranks(), 2)
