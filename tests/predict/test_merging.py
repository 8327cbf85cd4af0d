"""Merged experts are never those of another system: composition, charge, spin and data set may change."""

from collections.abc import Iterator

import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from torch.testing import assert_close

from gnnmd.graph import AtomBatch
from gnnmd.interfaces.ase import GNNMDCalculator
from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.escn_md import EscnMDConfig, ExpertsConfig
from gnnmd.models.merge import merged
from gnnmd.models.potential import Potential, Prediction
from gnnmd.predict import InferenceSettings, PredictUnit, load_checkpoint, save_checkpoint
from gnnmd.predict.unit import Follower
from tests.models.systems import randomised

MERGING = InferenceSettings(dtype="float64", merge_experts=True)


def network(experts: ExpertsConfig | None) -> Potential:
    torch.manual_seed(0)
    config = EscnMDConfig(
        channels=8,
        hidden_channels=8,
        edge_channels=8,
        num_basis=8,
        lmax=1,
        mmax=1,
        num_layers=2,
        r_cut=4.0,
        dataset_embedding=True,
        experts=experts,
    )
    return randomised(build_potential(PotentialConfig(config, datasets=("pbe", "scan"))), spread=0.3)


def water(**info: object) -> Atoms:
    atoms = molecule("H2O")
    atoms.info |= {"dataset": "pbe", **info}
    return atoms


def silver(n: int = 2) -> Atoms:
    atoms = bulk("Ag", cubic=True) * (n, 1, 1)
    atoms.rattle(0.1, seed=n)
    atoms.info["dataset"] = "pbe"
    return atoms


POTENTIAL = network(ExpertsConfig(count=4, where="all"))
UNMERGED = PredictUnit(POTENTIAL, device="cpu", settings=InferenceSettings(dtype="float64"))

#: What is met one after the other: every neighbour in the row has another mixture.
JOURNEY = [water(), silver(), water(), water(charge=1), water(spin=3), water(dataset="scan"), silver()]


@pytest.fixture(scope="module", params=[None, 2], ids=["one process", "two workers"])
def unit(request: pytest.FixtureRequest) -> Iterator[PredictUnit]:
    with PredictUnit(POTENTIAL, device="cpu", settings=MERGING, workers=request.param) as unit:
        yield unit


def assert_same(found: Prediction, expected: Prediction) -> None:
    for name in ("energy", "forces", "stress", "node_energies"):
        options = {"rtol": 0, "atol": 1e-10, "equal_nan": True}
        assert_close(getattr(found, name), getattr(expected, name), **options)


def test_water_silver_water(unit: PredictUnit) -> None:
    """To 1e-10, through both doors; mixtures differ by far more (negative control)."""
    for atoms in (*JOURNEY, *reversed(JOURNEY)):
        expected = UNMERGED.predict(atoms)
        assert_same(unit.predict(atoms), expected)
        assert_same(unit.evaluate(AtomBatch.from_ase(atoms)), expected)
    stale = merged(UNMERGED.potential, AtomBatch.from_ase(silver()))
    stale.merged_for = None
    wrong = PredictUnit(stale, device="cpu", settings=InferenceSettings(dtype="float64")).predict(water())
    assert (wrong.energy - UNMERGED.predict(water()).energy).abs().min() > 1e-4


def test_a_list_of_different_systems(unit: PredictUnit) -> None:
    """A call with several mixtures is exact too."""
    assert_same(unit.predict(JOURNEY), UNMERGED.predict(JOURNEY))
    assert_same(unit.evaluate(AtomBatch.from_ase(JOURNEY)), UNMERGED.evaluate(AtomBatch.from_ase(JOURNEY)))


def test_dynamics_follow_and_the_calculator_notices(unit: PredictUnit) -> None:
    calculator = GNNMDCalculator(unit)
    for atoms in (silver(), water(), silver()):
        for _ in range(3):
            atoms.rattle(0.02, seed=5)
            atoms.calc = calculator
            assert abs(atoms.get_potential_energy() - UNMERGED.predict(atoms).energy.item()) < 1e-10
    atoms.info["charge"] = 2  # of the same object
    assert abs(atoms.get_potential_energy() - UNMERGED.predict(atoms).energy.item()) < 1e-10


def test_weights_are_mixed_once_as_long_as_the_mixture_stays() -> None:
    unit = PredictUnit(POTENTIAL, device="cpu", settings=MERGING)
    follower = Follower(unit, 0.5)
    for _ in range(3):
        follower.evaluate(AtomBatch.from_ase(silver()))
    unit.predict([silver(2), silver(3), silver(1)])  # one mixture: fractions of elements are the same
    assert unit._experts.n_merges == 1
    follower.evaluate(AtomBatch.from_ase(water()))
    follower.evaluate(AtomBatch.from_ase(silver()))
    assert unit._experts.n_merges == 3
    used = unit._experts.for_batch(AtomBatch.from_ase(silver()))
    n_used, n_all = (sum(p.numel() for p in p.parameters()) for p in (used, unit.potential))
    assert n_used < 0.6 * n_all


@pytest.mark.parametrize(
    "experts",
    [
        ExpertsConfig(count=3, norm="pnorm"),
        ExpertsConfig(count=3, composition=False),
        ExpertsConfig(count=3, mean_counts_one_more=True),
        None,
    ],
    ids=["pnorm", "no composition", "one more", "no experts"],
)
def test_every_kind_of_mixture(experts: ExpertsConfig | None) -> None:
    """P-norm coefficients depend on the number of systems of a call: such batches are not merged."""
    potential = network(experts)
    one, other = (
        PredictUnit(potential, device="cpu", settings=InferenceSettings(dtype="float64", merge_experts=merge))
        for merge in (True, False)
    )
    for batch in ([silver(1)], [silver(2)], [water()], [silver(1), silver(1)], [silver(1)], JOURNEY):
        assert_same(one.evaluate(AtomBatch.from_ase(batch)), other.evaluate(AtomBatch.from_ase(batch)))
    assert (one._experts.n_merges > 0) == (experts is not None)


def test_settings_hold_for_merged_weights_and_random_numbers_are_left_alone() -> None:
    settings = InferenceSettings(merge_experts=True, edge_chunk=10)
    unit = PredictUnit(POTENTIAL, device="cpu", settings=settings)
    before = torch.get_rng_state()
    found = unit.predict(silver())
    assert torch.equal(torch.get_rng_state(), before)
    used = unit._experts.for_batch(AtomBatch.from_ase(silver()))
    assert used.backbone.edge_chunk == 10
    assert next(used.parameters()).dtype == torch.float32
    assert not any(p.requires_grad for p in used.parameters())
    assert_close(found.forces, UNMERGED.predict(silver()).forces, rtol=0, atol=1e-4)
    with torch.inference_mode():
        assert_close(unit.predict(water()).forces, UNMERGED.predict(water()).forces, rtol=0, atol=1e-4)


def test_a_merged_checkpoint_still_refuses_and_says_what_to_do(tmp_path) -> None:
    path = save_checkpoint(
        tmp_path / "merged.safetensors", merged(POTENTIAL, AtomBatch.from_ase(silver())).eval()
    )
    unit = PredictUnit(load_checkpoint(path)[0], device="cpu", settings=MERGING)
    unit.predict(silver(3))
    with pytest.raises(ValueError, match=r"Load the checkpoint from before merging; .*merge_experts=True"):
        unit.predict(water())
