"""Prediction by several processes, through the doors that users take."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from numpy.testing import assert_allclose

from gnnmd.graph import AtomBatch
from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.escn_md import EscnMDConfig
from gnnmd.models.potential import Potential, Prediction
from gnnmd.parallel import WorkerDied
from gnnmd.predict import InferenceSettings, PredictUnit, save_checkpoint
from gnnmd.predict.workers import number_of_workers
from tests.lennard_jones import FirstFeature, Hungry

SETTINGS = InferenceSettings(dtype="float64", descriptors=True)


def network() -> Potential:
    """Two layers, so that features travel, and balanced channels, so that sums over systems do."""
    config = EscnMDConfig(
        channels=8,
        hidden_channels=8,
        edge_channels=8,
        num_basis=8,
        lmax=1,
        mmax=1,
        num_layers=2,
        r_cut=4.0,
        charge_balanced_channels=(1,),
    )
    torch.manual_seed(0)
    return build_potential(PotentialConfig(config, datasets=("pbe", "scan"), elements=(1, 6, 8, 29, 47)))


def with_info(atoms: Atoms, **info: object) -> Atoms:
    atoms.info |= {"dataset": "pbe", **info}
    return atoms


def long_crystal() -> Atoms:
    """Five cutoffs long: not every atom is everyone's ghost."""
    atoms = bulk("Ag", cubic=True) * (2, 2, 5)
    atoms.rattle(0.1, seed=1)
    return with_info(atoms)


def slab() -> Atoms:
    atoms = fcc111("Ag", (4, 3, 2), vacuum=9.0, periodic=True)
    atoms.rattle(0.1, seed=2)
    return with_info(atoms, charge=1)


SYSTEMS = {
    "bulk": long_crystal(),
    "slab": slab(),
    "molecule": with_info(molecule("CH3CH2OH"), dataset="scan", spin=3),
    "one atom": with_info(Atoms("Cu")),
    "more ranks than atoms": with_info(Atoms("CO", [[0, 0, 0], [0, 0, 1.1]])),
    "batch": [
        long_crystal(),
        with_info(Atoms("Cu")),
        with_info(molecule("H2O"), charge=-1),
        slab(),
        with_info(bulk("Ag"), dataset="scan"),
    ],
}

ALONE = PredictUnit(network(), device="cpu", settings=SETTINGS)


@pytest.fixture(scope="module")
def shared() -> Iterator[PredictUnit]:
    with PredictUnit(network(), device="cpu", settings=SETTINGS, workers=2) as unit:
        yield unit


def assert_equal(a: Prediction, b: Prediction, tolerance: float = 1e-10) -> None:
    for name in ("energy", "forces", "stress", "node_energies", "descriptors"):
        found, expected = getattr(a, name), getattr(b, name)
        assert (found.dtype, found.device) == (expected.dtype, expected.device)
        assert_allclose(found, expected, atol=tolerance, rtol=0, err_msg=name)


def test_three_workers_give_what_one_process_gives() -> None:
    with PredictUnit(network(), device="cpu", settings=SETTINGS, workers=3) as three:
        for atoms in SYSTEMS.values():
            assert_equal(three.predict(atoms), ALONE.predict(atoms))


def test_two_workers_give_what_one_process_gives(shared: PredictUnit) -> None:
    """One after the other and back, so that nothing of the last system may remain in the next."""
    for atoms in (*SYSTEMS.values(), *reversed(SYSTEMS.values())):
        assert_equal(shared.predict(atoms), ALONE.predict(atoms))
    batch = AtomBatch.from_ase(SYSTEMS["batch"])
    expected = ALONE.evaluate(batch)
    assert_equal(shared.evaluate(batch), expected)
    with torch.inference_mode():
        assert_equal(shared.evaluate(AtomBatch.from_ase(SYSTEMS["batch"])), expected)


def test_whatever_changes_between_calls_is_noticed(shared: PredictUnit) -> None:
    batch = AtomBatch.from_ase(long_crystal())
    moved = batch.positions.clone()
    moved[3] += 0.3
    species = batch.numbers.clone()
    species[7] = 29
    changes = {
        "positions": moved,
        "numbers": species,
        "cell": batch.cell * 1.02,
        "pbc": torch.tensor([[True, False, True]]),
        "charge": torch.tensor([2]),
        "spin": torch.tensor([2]),
        "dataset": ("scan",),
    }
    before = ALONE.evaluate(batch)
    for name, value in changes.items():
        assert_equal(shared.evaluate(batch), before)
        changed = replace(batch, **{name: value})
        expected = ALONE.evaluate(changed)
        assert (expected.forces - before.forces).abs().max() > 1e-6, name
        assert_equal(shared.evaluate(changed), expected)


def test_what_is_wrong_with_a_system_is_said_as_by_one_process_and_workers_live_on(
    shared: PredictUnit,
) -> None:
    gold, lost, flat = (with_info(bulk("Ag", cubic=True)) for _ in range(3))
    gold.numbers[0] = 79
    lost.positions[2, 1] = np.nan
    flat.cell[2] = flat.cell[1]
    for atoms, message in [
        (gold, "the model was not trained on Au"),
        (lost, r"atom 2 of system 0 is at \[.*nan"),
        (flat, "the cell of system 0 is singular along its periodic axes"),
        (with_info(bulk("Ag"), dataset="wb97"), "dataset 'wb97' is not known"),
        (with_info(bulk("Ag"), charge=10**6), "charge .* is outside"),
    ]:
        with pytest.raises(ValueError, match=message):
            ALONE.predict(atoms)
        with pytest.raises(ValueError, match=message):
            shared.predict(atoms)
        with pytest.raises(ValueError, match=message.replace("system 0", "system 1")):
            shared.predict([long_crystal(), atoms])
    batch = AtomBatch.from_ase(long_crystal())
    neighbors = ALONE.neighbor_list(batch)
    with pytest.raises(ValueError, match="workers search their neighbours themselves"):
        shared.evaluate(batch, neighbors)
    assert_equal(shared.predict(long_crystal()), ALONE.predict(long_crystal()))


def test_a_list_is_evaluated_in_few_calls_in_its_order(shared: PredictUnit) -> None:
    images = [long_crystal() for _ in range(6)]
    for k, atoms in enumerate(images):
        atoms.rattle(0.02, seed=k)
    expected = ALONE.predict(images)
    done: list[int] = []
    assert_equal(shared.predict(images, progress=done.append), expected)
    assert sum(done) == 6
    assert len(done) < 6
    done.clear()
    shared.predict(images[:1])
    assert done == []


def test_settings_reach_the_workers() -> None:
    settings = InferenceSettings(
        dtype="float32", stress=False, edge_chunk=50, max_edges=1, neighbors="torch", max_atoms=100
    )
    alone = PredictUnit(network(), device="cpu", settings=settings)
    images = [long_crystal(), slab()]
    done: list[int] = []
    with PredictUnit(network(), device="cpu", settings=settings, workers=2) as shared:
        found = shared.predict(images, progress=done.append)
    assert done == [1, 1]
    assert found.stress is None
    assert found.descriptors is None
    exact = ALONE.predict(images)
    assert_allclose(found.forces, alone.predict(images).forces, atol=1e-5)
    assert (found.forces - exact.forces).abs().max() > 1e-9  # float32 was really used
    with pytest.raises(WorkerDied, match="closed"):
        shared.predict(images)


def test_death_of_a_worker_and_what_comes_after() -> None:
    with PredictUnit(network(), device="cpu", workers=1) as shared:
        os.kill(shared._together._workers._processes[0].pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match=r"worker 0 of 1 died \(signal 9\)"):
            shared.predict(long_crystal())
        with pytest.raises(WorkerDied, match="start new ones"):
            shared.predict(long_crystal())


def test_memory_that_runs_out_on_one_rank_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gnnmd.parallel.workers.GRACE", 1.0)
    potential = Potential(Hungry(5.0, 0.3, 2.63), {"energy": FirstFeature()})
    with PredictUnit(potential, device="cpu", workers=2) as shared:
        with pytest.raises(MemoryError, match=r"rank 1 of 2, with 40 atoms of its own, .*Use more") as raised:
            shared.predict(long_crystal())
        assert "so they were ended; start new ones" in raised.value.__notes__[-1]
        with pytest.raises(WorkerDied, match="start new ones"):
            shared.predict(long_crystal())


def test_numbers_of_workers_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="workers=0: at least one process"):
        PredictUnit(network(), device="cpu", workers=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="workers=3 needs as many GPUs, but torch sees 2"):
        PredictUnit(network(), device="cuda", workers=3)
    with pytest.raises(ValueError, match="device='cuda:1' is one GPU, but each worker takes its own"):
        PredictUnit(network(), device="cuda:1", workers=2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        ValueError, match="workers=2, but torchrun or srun has started 4 processes.*workers=4"
    ):
        PredictUnit(network(), device="cpu", workers=2)
    assert PredictUnit(network(), device="cpu").predict(slab()).energy.isfinite()  # alone, as ever


def test_how_many_workers_are_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda, one = (torch.device(name) for name in ("cpu", "cuda", "cuda:1"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [number_of_workers(n, cuda) for n in (None, 1, 2)] == [None, 1, 2]
    assert [number_of_workers("auto", device) for device in (cuda, one, cpu)] == [3, None, None]
    with pytest.raises(ValueError, match="workers='all': give a number of processes, 'auto' or None"):
        number_of_workers("all", cuda)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert [number_of_workers("auto", device) for device in (cuda, cpu)] == [4, 4]
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert number_of_workers("auto", cuda) is None
    assert PredictUnit(network(), device="cpu", workers="auto").workers is None


# Lines are written at once: two processes write to one pipe, and print() writes in pieces.
SCRIPT = """
import os
from ase.build import bulk
from gnnmd import GNNMDCalculator, InferenceSettings, PredictUnit

exact = InferenceSettings(dtype="float64")
unit = PredictUnit.from_checkpoint("model.safetensors", device="cpu", settings=exact, workers=WORKERS)
atoms = bulk("Ag", cubic=True) * (2, 2, 5)
atoms.rattle(0.1, seed=1)
atoms.calc = GNNMDCalculator(unit, dataset="pbe")
energy, force = float(atoms.get_potential_energy()), float(abs(atoms.get_forces()).max())
os.write(1, f"{energy!r} {force!r}\\n".encode())
"""

DIFFERENT = """
atoms.rattle(0.1, seed=unit._together.ranks.rank)
try:
    atoms.get_forces()
except ValueError as error:
    os.write(1, f"{error}\\n".encode())
"""


@pytest.mark.parametrize("starter", ["python", "torchrun"])
def test_a_script_without_main_guard(starter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started as one process, or as many by torchrun: the same lines, the same numbers in every process."""
    save_checkpoint(tmp_path / "model.safetensors", network())
    script = SCRIPT.replace("WORKERS", "2" if starter == "python" else "'auto'")
    (tmp_path / "script.py").write_text(script + DIFFERENT * (starter == "torchrun"))
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *(torchrun if starter == "torchrun" else []), "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    expected = ALONE.predict(long_crystal())
    wanted = [expected.energy.item(), float(expected.forces.abs().max())]
    lines = done.stdout.splitlines()
    numbers = [line for line in lines if line[0] == "-" or line[0].isdigit()]
    assert len(numbers) == (2 if starter == "torchrun" else 1)
    for line in numbers:
        assert_allclose([float(x) for x in line.split()], wanted, atol=1e-9)
    if starter == "torchrun":
        assert sum("the ranks were not given the same systems" in line for line in lines) == 2
    else:
        assert done.stderr == ""
