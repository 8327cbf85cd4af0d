import pytest
import torch

from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.escn_md import EscnMDConfig, ExpertsConfig
from gnnmd.models.potential import Potential
from tests.parallel.parity import assert_ranks_agree, deviations, many_ranks, one_rank
from tests.parallel.structures import structure


def _potential(heads: str = "conservative", **model) -> Potential:
    """A small network in float64 whose every weight is random: fresh ones are partly zero and hide errors."""
    shape = {"channels": 8, "hidden_channels": 8, "edge_channels": 8, "num_basis": 8, "max_number": 60}
    config = EscnMDConfig(r_cut=4.2, lmax=2, mmax=1, num_layers=3, **shape, **model)
    torch.manual_seed(0)
    potential = build_potential(PotentialConfig(model=config, heads=heads)).double()
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return potential


def conservative() -> Potential:
    return _potential()


def balanced_experts() -> Potential:
    """Channel balancing and routing by composition sum over all atoms of a system and feed back into each."""
    experts = ExpertsConfig(count=3, composition=True)
    return _potential(charge_balanced_channels=(1,), spin_balanced_channels=(2,), experts=experts)


def direct() -> Potential:
    return _potential(heads="direct")


def limited_neighbors() -> Potential:
    return _potential(max_neighbors=9)


def check(pool, size: int, make, name: str, context: str = "all_to_all") -> None:
    assert_ranks_agree(pool, size, make, structure(name), context)


@pytest.mark.parametrize(
    ("size", "name"),
    [
        (2, "bulk several cutoffs long"),
        (3, "bulk several cutoffs long"),
        (4, "bulk several cutoffs long"),
        (3, "triclinic"),
        (4, "one conventional cell"),
        (8, "box thinner than the cutoff"),
        (8, "molecule"),
    ],
)
def test_conservative_model_on_many_ranks_equals_one(pool, size, name):
    check(pool, size, conservative, name)


@pytest.mark.parametrize("size", [2, 3])
def test_sums_over_a_system_that_feed_back_are_exact_for_batches(pool, size):
    check(pool, size, balanced_experts, "batch")


def test_direct_heads_on_many_ranks_equal_one(pool):
    check(pool, 3, direct, "slab with vacuum")


def test_a_limited_number_of_neighbors_chooses_the_same_ones(pool):
    check(pool, 3, limited_neighbors, "unwrapped")


@pytest.mark.parametrize("context", ["all_to_all", "all_gather"])
def test_edges_of_the_skin_and_spare_rows_change_nothing(pool, context):
    batch = structure("unwrapped")
    expected = one_rank(conservative(), batch)
    for found in pool.run(3, many_ranks, conservative, batch, "auto", context, 0.5, 0.2, timeout=120):
        assert max(deviations(found, expected).values()) < 1e-10, deviations(found, expected)


def test_all_gather_gives_the_same_network(pool):
    check(pool, 3, conservative, "unwrapped", "all_gather")


@pytest.mark.parametrize("fault", ["NoGhosts", "DroppedBackward", "DoubledSum"])
def test_a_broken_operator_is_noticed(pool, fault):
    batch = structure("bulk several cutoffs long")
    expected = one_rank(conservative(), batch)
    found = deviations(pool.run(2, many_ranks, conservative, batch, "auto", fault)[0], expected)
    assert max(value for name, value in found.items() if name.startswith("gradient")) > 1e-6
    if fault == "DroppedBackward":
        assert found["energy"] < 1e-10
        assert found["forces"] > 1e-6
    if fault == "DoubledSum":
        assert max(found["energy"], found["forces"], found["stress"]) < 1e-10


def test_a_shared_sum_without_backward_is_noticed(pool):
    batch = structure("unwrapped")
    expected = one_rank(balanced_experts(), batch)
    found = deviations(
        pool.run(2, many_ranks, balanced_experts, batch, "auto", "SharedAsResult")[0], expected
    )
    assert found["energy"] < 1e-10
    assert found["forces"] > 1e-6
