import pytest
import torch

from gnnmd.models.dpa2 import dpa2_potential
from gnnmd.models.dpa2_config import DPA2Config, RepformerConfig, RepinitConfig
from gnnmd.models.heads import FittingNetConfig
from gnnmd.models.potential import Potential
from gnnmd.parallel import Ranks
from tests.parallel.parity import assert_ranks_agree
from tests.parallel.structures import structure


def every_update(nsel: int = 60) -> Potential:
    """A small network in float64 with every update there is, and random weights.

    Its first descriptor reaches farther than its layers, which exchange only what they read.
    """
    torch.manual_seed(0)
    wide = {"rcut": 5.0, "nsel": nsel, "neuron": (4, 8), "axis_neuron": 3, "tebd_dim": 4}
    three_body = {"three_body_rcut": 3.6, "three_body_rcut_smth": 1.0, "three_body_sel": 20}
    near = {"rcut": 3.4, "rcut_smth": 1.0, "nsel": 16, "nlayers": 3, "g1_dim": 8, "g2_dim": 6}
    heads = {"attn1_hidden": 4, "attn1_nhead": 2, "attn2_hidden": 4, "attn2_nhead": 2}
    updates = {"update_g1_has_attn": True, "update_g2_has_g1g1": True, "update_h2": True}
    config = DPA2Config(
        type_map=("Cu", "Ag"),
        repinit=RepinitConfig(**wide, **three_body),
        repformer=RepformerConfig(**near, **heads, **updates, update_residual=0.5),
        fitting_net=FittingNetConfig(neuron=(8, 8)),
        add_tebd_to_repinit_out=True,
    )
    potential = dpa2_potential(config).double()
    for neighborhood in potential.backbone.neighborhoods:
        neighborhood.environment.std.fill_(0.05)  # neighbours matter
    potential.energy_scale.fill_(20.0)
    return potential


def nearest() -> Potential:
    """The same with room for fewer neighbours than there are."""
    return every_update(nsel=9)


def chunked() -> Potential:
    """The same in pieces that are computed again in the backward pass."""
    potential = every_update()
    potential.backbone.edge_chunk = 300
    return potential


def check(pool, size: int, make, name: str, context: str = "all_to_all", skin=0.0, headroom=0.0) -> None:
    assert_ranks_agree(pool, size, make, structure(name), context, skin, headroom)


@pytest.mark.parametrize(
    ("size", "name"),
    [
        (2, "bulk several cutoffs long"),
        (4, "bulk several cutoffs long"),
        (3, "triclinic"),
        (4, "one conventional cell"),
        (8, "box thinner than the cutoff"),
        (8, "molecule"),
        (3, "batch"),
    ],
)
def test_many_ranks_equal_one(pool, size, name):
    check(pool, size, every_update, name)


@pytest.mark.parametrize("context", ["all_to_all", "all_gather"])
def test_edges_of_the_skin_and_spare_rows_change_nothing(pool, context):
    check(pool, 3, every_update, "unwrapped", context, 0.5, 0.2)


@pytest.mark.parametrize(("size", "name"), [(3, "unwrapped"), (2, "perfect crystal"), (4, "perfect crystal")])
def test_the_nearest_neighbours_are_the_same_on_many_ranks(pool, size, name):
    """Also where it is the last of several equally near ones that finds room."""
    check(pool, size, nearest, name)


def test_pieces_are_the_same_on_many_ranks(pool):
    check(pool, 2, chunked, "slab with vacuum")


def test_layers_exchange_near_ghosts_only(pool):
    """Otherwise the tests above would pass without it."""
    batch = structure("bulk several cutoffs long")
    for near, everything in pool.run(2, ghosts, batch, timeout=60):
        assert 0 < near < 0.8 * everything


def ghosts(group, batch) -> tuple[int, int]:
    """Return how many ghosts layers exchange and how many there are; job for the worker pool."""
    gp = every_update().plan(batch, Ranks(group)).gp
    return gp.between_layers.n_ghost, gp.n_ghost
