import pytest
import torch

from gnnmd.models.dpa3 import dpa3_potential
from gnnmd.models.dpa3_config import DPA3Config
from gnnmd.models.heads import FittingNetConfig
from gnnmd.models.potential import Potential
from gnnmd.parallel import GPContext, Ranks, build_plan, share_of
from tests.parallel.parity import assert_ranks_agree, deviations, many_ranks, one_rank
from tests.parallel.structures import structure


def _potential(**options) -> Potential:
    """A small network in float64 with random weights."""
    shape = {"n_dim": 10, "e_dim": 8, "a_dim": 4, "nlayers": 3, "e_sel": 60, "a_sel": 30}
    cutoffs = {"e_rcut": 4.4, "e_rcut_smth": 3.9, "a_rcut": 3.4, "a_rcut_smth": 2.9}
    fitting = FittingNetConfig((8, 8), "silut:10")
    torch.manual_seed(0)
    config = DPA3Config(type_map=("Cu", "Ag"), fitting_net=fitting, **{**shape, **cutoffs, **options})
    return dpa3_potential(config).double()


def published() -> Potential:
    return _potential()


def sequential() -> Potential:
    """Uses every weight of every layer, and embeds charge and spin."""
    return _potential(nlayers=2, sequential_update=True, add_chg_spin_ebd=True, concat_output_tebd=True)


def nearest() -> Potential:
    """Keeps fewer neighbours than there are."""
    return _potential(use_dynamic_sel=False, e_sel=15, a_sel=9)


def chunked() -> Potential:
    """Computes pieces again in the backward pass."""
    potential = _potential()
    potential.backbone.edge_chunk = 300
    return potential


def check(pool, size: int, make, name: str, context: str = "all_to_all", skin=0.0, headroom=0.0) -> None:
    assert_ranks_agree(pool, size, make, structure(name), context, skin, headroom)


@pytest.mark.parametrize(
    ("size", "name"),
    [
        (2, "bulk several cutoffs long"),
        (3, "triclinic"),
        (4, "slab with vacuum"),
        (4, "one conventional cell"),
        (8, "box thinner than the cutoff"),
        (8, "molecule"),
    ],
)
def test_many_ranks_equal_one(pool, size, name):
    check(pool, size, published, name)


def test_a_batch_with_charges_on_many_ranks(pool):
    check(pool, 3, sequential, "batch")


@pytest.mark.parametrize(("size", "name"), [(3, "unwrapped"), (2, "perfect crystal")])
def test_truncation_keeps_the_same_neighbours(pool, size, name):
    """Every rank has all edges of its atoms, so that it can choose the nearest."""
    check(pool, size, nearest, name)


def test_pieces_on_many_ranks(pool):
    check(pool, 2, chunked, "unwrapped")


@pytest.mark.parametrize("context", ["all_to_all", "all_gather"])
@pytest.mark.parametrize("make", [published, nearest])
def test_edges_of_the_skin_and_spare_rows_change_nothing(pool, make, context):
    check(pool, 3, make, "unwrapped", context, skin=0.5, headroom=0.2)


@pytest.mark.parametrize("fault", ["NoGhosts", "DroppedBackward", "DoubledSum"])
def test_a_broken_operator_is_noticed(pool, fault):
    batch = structure("bulk several cutoffs long")
    expected = one_rank(published(), batch)
    found = deviations(pool.run(2, many_ranks, published, batch, "auto", fault)[0], expected)
    assert max(value for name, value in found.items() if name.startswith("gradient")) > 1e-6


class CountedExchanges(GPContext):
    """Counts exchanges of features; those of positions have three columns."""

    widths: list[int] = []

    def exchange(self, owned):
        self.widths.append(owned.shape[1])
        return super().exchange(owned)


def exchanged_widths(group, make, batch) -> list[int]:
    """Job for the pool: return the columns of everything that is exchanged for one evaluation."""
    ranks, potential = Ranks(group), make().eval()
    piece, ids = share_of(batch, ranks)
    plan = build_plan(piece, ids, potential.r_cut, ranks)
    CountedExchanges.widths = []
    gp = CountedExchanges(**{name: getattr(plan.gp, name) for name in plan.gp.__dataclass_fields__})
    potential(plan.positions, plan.graph, gp)
    return CountedExchanges.widths


def test_one_exchange_between_layers_and_none_before_the_first(pool):
    """Positions, then features of atoms after all layers but the last."""
    for widths in pool.run(2, exchanged_widths, published, structure("unwrapped")):
        assert widths == [3, 10, 10]
