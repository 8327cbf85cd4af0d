from collections.abc import Iterator

import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from gnnmd.graph import AtomBatch
from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.escn_md import EscnMDConfig
from gnnmd.models.potential import Potential
from gnnmd.parallel import Ranks
from gnnmd.predict import self_check as module
from gnnmd.predict.self_check import Finding, self_check
from tests import broken
from tests.parallel.pool import RankError, WorkerPool

SMALL = {
    **dict.fromkeys(("channels", "hidden_channels", "edge_channels", "num_basis"), 4),
    **{"r_cut": 4.5, "num_layers": 1, "mmax": 1},
}


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(sizes=(2,))
    yield pool
    pool.close()


@pytest.fixture
def ranks(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes of the pool stand in for workers, which take seconds to start."""

    class PoolWorkers:
        def __init__(self, n, device):
            self.n = n

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def call(self, function, *args):
            return pool.run(self.n, with_ranks, function, *args)

    monkeypatch.setattr(module, "Workers", PoolWorkers)


def with_ranks(group, function, *args):
    return function(Ranks(group), *args)


def crystal(repeat=(3, 1, 1)) -> Atoms:
    """Return silver, strained and displaced."""
    atoms = bulk("Ag", cubic=True).repeat(repeat)
    atoms.set_cell(atoms.cell * [[1.02], [1.0], [0.99]], scale_atoms=True)
    atoms.rattle(0.1, seed=1)
    return atoms


def cluster() -> Atoms:
    atoms = crystal()
    atoms.cell, atoms.pbc = None, False
    return atoms


def escn_md(heads: str = "conservative", **model) -> Potential:
    torch.manual_seed(0)
    config = PotentialConfig(model=EscnMDConfig(**{**SMALL, **model}), heads=heads)
    return build_potential(config)


def check(potential: Potential, atoms: Atoms, ranks=(1,)) -> list[Finding]:
    return list(self_check(potential, AtomBatch.from_ase(atoms), device="cpu", ranks=ranks))


def names(findings: list[Finding], passed: bool | None) -> set[str]:
    return {f.name for f in findings if f.passed is passed}


def test_a_sound_potential_passes_everything_on_a_crystal(ranks) -> None:
    findings = check(broken.Sound(), crystal((6, 1, 1)), ranks=(1, 2))
    assert not names(findings, False)
    quantities = {"energy", "forces", "stress"}
    compared = ("translation", "rotation", "permutation", "float32", "1 rank", "2 ranks")
    assert names(findings, True) == {
        *("energy = sum of atoms", "forces = -dE/dx", "stress = dE/dstrain / V", "sum of forces"),
        *(f"{name}: {quantity}" for name in compared for quantity in quantities),
        *(f"{name}: {what}" for name in ("1 rank", "2 ranks") for what in ("plan", "node energies")),
    }
    assert not names(findings, None)  # no warnings: with 24 A, not every atom is a ghost


def test_a_network_passes_on_a_molecule_which_has_no_stress(ranks) -> None:
    findings = check(escn_md(num_layers=2), molecule("CH3OH"), ranks=(2,))
    assert not names(findings, False)
    assert not any("stress" in f.name for f in findings if f.passed is not None)
    assert any(f.remark.startswith("not checked: no periodic cell") for f in findings)


@pytest.mark.parametrize("model", [{"feed_forward": "grid"}, {"activation": "s2"}])
def test_networks_with_a_grid_pass_with_a_limit_of_their_own(model) -> None:
    findings = check(escn_md(**model), molecule("H2O"))
    assert not names(findings, False)
    limits = {f.name: f.limit for f in findings}
    assert limits["rotation: forces"] > 1e6 * limits["permutation: forces"]


def test_direct_forces_and_stress_need_not_be_derivatives(ranks) -> None:
    """What they deviate by is told, and demanded nothing of."""
    findings = check(escn_md(heads="direct"), crystal((1, 1, 1)), ranks=(2,))
    assert not names(findings, False)
    told = {f.name: f.found for f in findings if f.passed is None and f.found is not None}
    assert set(told) == {"forces = -dE/dx", "stress = dE/dstrain / V", "sum of forces"}
    assert min(told.values()) > 1e-6


FAULTS = {
    broken.ForcesHaveTheWrongSign: {"forces = -dE/dx"},
    broken.OneForceIsTooLarge: {"forces = -dE/dx", "sum of forces", "permutation: forces", "1 rank: forces"},
    broken.StressIsTwiceTooLarge: {"stress = dE/dstrain / V"},
    broken.ShearStressIsHalved: {"stress = dE/dstrain / V", "rotation: stress"},
    broken.StressIsNotANumber: {
        "stress = dE/dstrain / V",
        *(f"{n}: stress" for n in ("translation", "rotation", "permutation", "float32", "1 rank")),
    },
    broken.EnergyIsNotTheSumOfItsAtoms: {"energy = sum of atoms"},
    broken.SpaceHasAnAxis: {f"rotation: {x}" for x in ("energy", "forces", "stress")},
    broken.AtomsAreNumbered: {
        *(f"{n}: {x}" for n in ("permutation", "1 rank") for x in ("energy", "forces", "stress")),
        "1 rank: node energies",
    },
    broken.SinglePrecisionIsCoarse: {"float32: forces"},
    broken.SinglePrecisionRaises: {"float32"},
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_fails_the_checks_that_it_concerns_and_no_others(fault) -> None:
    assert names(check(fault(), crystal()), False) == FAULTS[fault]


def test_an_energy_that_depends_on_the_origin_fails() -> None:
    failed = names(check(broken.SpaceHasACentre(), cluster()), False)
    assert failed == {"sum of forces", "translation: energy", "translation: forces"}


FAULTS_OF_MANY = {
    broken.ReadsStaleGhosts: {f"2 ranks: {x}" for x in ("energy", "forces", "stress", "node energies")},
    broken.ForgetsForcesOfGhosts: {"2 ranks: forces", "2 ranks: stress"},
    broken.StressIsSummedTwice: {"2 ranks: stress"},
    broken.RanksHaveTheirOwnEnergy: {"2 ranks: energy"},
    broken.RaisesOnAllRanks: {"2 ranks"},
}


@pytest.mark.parametrize("fault", FAULTS_OF_MANY, ids=lambda fault: fault.__name__)
def test_a_fault_of_communication_fails_only_where_there_are_several_ranks(fault, ranks) -> None:
    assert names(check(fault(), crystal(), ranks=(1, 2)), False) == FAULTS_OF_MANY[fault]


def test_an_incomplete_halo_is_a_failed_check_with_its_message(ranks, monkeypatch) -> None:
    class Broke:
        def __init__(self, n, device):
            raise RankError("rank 1 of 2 failed while checking its plan: the halo is incomplete")

    monkeypatch.setattr(module, "Workers", Broke)
    (failed,) = (f for f in check(broken.Sound(), cluster(), ranks=(2,)) if f.passed is False)
    assert failed.name == "2 ranks"
    assert "the halo is incomplete" in failed.remark


def test_forces_that_vanish_by_symmetry_are_not_taken_for_evidence() -> None:
    """In a perfect crystal a wrong sign agrees with everything."""
    findings = check(broken.ForcesHaveTheWrongSign(), bulk("Ag", cubic=True))
    assert "displaced" in findings[0].remark
    assert names(findings, False) == {"forces = -dE/dx"}


def test_a_lone_atom_passes() -> None:
    findings = check(broken.Sound(), Atoms("Ag"))
    assert not names(findings, False)


def test_copies_of_all_atoms_on_every_rank_are_pointed_out(ranks) -> None:
    notes = [f.remark for f in check(broken.Sound(), crystal(), ranks=(2,)) if f.name == "note"]
    assert any("every rank has a copy of every atom" in note and "--repeat" in note for note in notes)


def test_atoms_on_top_of_each_other_are_pointed_out() -> None:
    atoms = Atoms("Ag2", positions=[[0, 0, 0], [0, 0, 0.4]])
    assert any("only 0.4 A apart" in f.remark for f in check(broken.Sound(), atoms))


@pytest.mark.parametrize("ranks", [(), (0, 1), (-2,)])
def test_impossible_numbers_of_ranks_are_refused_before_anything_is_computed(ranks) -> None:
    with pytest.raises(ValueError, match="positive numbers"):
        check(broken.Sound(), crystal(), ranks=ranks)


def test_more_ranks_than_gpus_are_refused_before_anything_is_computed(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert module.default_ranks(torch.device("cuda")) == [1, 2]
    with pytest.raises(ValueError, match="4 ranks need as many GPUs, but torch sees 2"):
        module._check_ranks([1, 4], torch.device("cuda"))
