import os
import re
import signal
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.constraints import FixAtoms
from ase.io import read, write
from numpy.testing import assert_allclose, assert_array_equal

from gnnmd import GNNMDCalculator
from gnnmd.cli import main
from gnnmd.interfaces.ase_md import DynamicsError, MDConfig, MDResult, MDStatus, run_md, starting_structure
from gnnmd.interfaces.commands import md
from gnnmd.predict import InferenceSettings
from tests.lennard_jones import lennard_jones


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def calculator() -> GNNMDCalculator:
    return GNNMDCalculator(lennard_jones(), device="cpu", settings=InferenceSettings(dtype="float64"))


def run(**options: object) -> MDResult:
    defaults = {
        "repeat": (2, 2, 2),
        "steps": 20,
        "log_interval": 1,
        "trajectory_interval": 5,
        "restart_interval": 10,
    }
    return run_md(MDConfig(**{**defaults, **options}), calculator=calculator())


def frames(path: str = "md.extxyz") -> list[Atoms]:
    return read(path, index=":")


def steps(path: str = "md.extxyz") -> list[int]:
    return [frame.info["step"] for frame in frames(path)]


def test_energy_error_of_constant_energy_dynamics_falls_with_the_square_of_the_timestep() -> None:
    rms = []
    for timestep in (2.0, 4.0):
        result = run(timestep=timestep, steps=int(1000 / timestep), temperature=200, trajectory=None)
        kept = result.time > 200  # the crystal has forgotten its start
        rms.append(np.std(result.total[kept]))
        assert np.ptp(result.total) < 0.02 * np.ptp(result.potential)
    assert rms[1] / rms[0] == pytest.approx(4, abs=0.4)


def test_constant_energy_dynamics_runs_backwards_to_its_start() -> None:
    there = run(steps=50)
    there.atoms.set_momenta(-there.atoms.get_momenta())
    back = run(structure=_exact(there.atoms.copy()), repeat=None, steps=50)
    start = starting_structure(MDConfig(repeat=(2, 2, 2)))
    assert np.abs(there.atoms.positions - start.positions).max() > 0.1
    assert_allclose(back.atoms.positions, start.positions, atol=1e-10)


def _exact(atoms: Atoms) -> str:
    write("start.traj", atoms)
    return "start.traj"


def test_langevin_dynamics_reaches_the_temperature_of_the_bath() -> None:
    result = run(ensemble="nvt", temperature=500, friction=0.1, steps=700, timestep=4.0, trajectory=None)
    sampled = result.temperature[100:]
    # 96 degrees of freedom: a relative standard deviation of sqrt(2 / 96); one independent sample per 20 fs
    assert sampled.mean() == pytest.approx(500, rel=3 * np.sqrt(2 / 96 / 120))
    assert sampled.std() / 500 == pytest.approx(np.sqrt(2 / 96), rel=0.3)


def test_first_velocities_have_the_temperature_and_no_drift() -> None:
    atoms = run(steps=0, repeat=(4, 4, 4), temperature=700).atoms
    assert_allclose(atoms.get_momenta().sum(0), 0, atol=1e-10)
    assert atoms.get_temperature() == pytest.approx(700, rel=3 * np.sqrt(2 / (3 * 256)))
    assert_array_equal(run(steps=0, seed=1).atoms.get_momenta(), run(steps=0, seed=1).atoms.get_momenta())
    assert (run(steps=0, seed=1).atoms.get_momenta() != run(steps=0, seed=2).atoms.get_momenta()).all()
    free = molecule("CH3CH2OH")
    free.set_masses([100.0] * 9)
    atoms = run(structure=_exact(free), repeat=None, steps=0).atoms
    assert_allclose(atoms.get_angular_momentum(), 0, atol=1e-10)


def test_velocities_of_the_structure_are_kept() -> None:
    atoms = bulk("Ag", cubic=True)
    atoms.set_momenta([[0.5, 0, 0]] * 4)
    assert_array_equal(
        run(structure=_exact(atoms), repeat=None, steps=0).atoms.get_momenta(), atoms.get_momenta()
    )


def test_trajectory_holds_what_the_run_computed() -> None:
    result = run(ensemble="nvt")
    assert steps() == [0, 5, 10, 15, 20]
    last = frames()[-1]
    assert last.info["time_fs"] == 100
    assert_allclose(last.positions, result.atoms.positions, atol=1e-7)
    assert_allclose(last.get_momenta(), result.atoms.get_momenta(), atol=1e-7)
    assert_allclose(last.get_forces(), result.atoms.get_forces(), atol=1e-7)
    assert last.get_potential_energy() / 32 == pytest.approx(result.potential[-1])
    assert (last.get_potential_energy() + last.get_kinetic_energy()) / 32 == pytest.approx(result.total[-1])
    assert_array_equal(result.time, 5.0 * np.arange(21))
    assert (result.step, result.finished) == (20, True)


@pytest.mark.parametrize("ensemble", ["nve", "nvt"])
def test_a_resumed_run_is_the_run_that_was_never_interrupted(ensemble: str) -> None:
    whole = run(ensemble=ensemble, trajectory="whole.extxyz", restart=None)
    run(ensemble=ensemble, steps=12)
    resumed = run(ensemble=ensemble, resume=True)
    assert_array_equal(resumed.atoms.positions, whole.atoms.positions)
    assert_array_equal(resumed.atoms.get_momenta(), whole.atoms.get_momenta())
    assert_array_equal(resumed.total, whole.total[12:])
    assert Path("md.extxyz").read_bytes() == Path("whole.extxyz").read_bytes()


def test_a_run_killed_between_restart_files_neither_repeats_nor_loses_frames() -> None:
    run(trajectory="whole.extxyz", restart="whole.npz")
    run(steps=10)
    early = Path("md.restart.npz").read_bytes()  # of step 10
    run(steps=17)
    assert steps() == [0, 5, 10, 15]
    Path("md.restart.npz").write_bytes(early)
    with Path("md.extxyz").open("a") as file:
        file.write("32\nhalf a frame")
    run(resume=True)
    assert steps() == [0, 5, 10, 15, 20]
    assert Path("md.extxyz").read_bytes() == Path("whole.extxyz").read_bytes()


def test_a_new_run_replaces_the_old_trajectory() -> None:
    run(steps=10)
    run(steps=5)
    assert steps() == [0, 5]


def test_constraints_of_the_structure_hold_also_after_resuming() -> None:
    atoms = bulk("Ag", cubic=True) * 2
    atoms.set_constraint(FixAtoms([0, 5]))
    structure = _exact(atoms)
    for options in ({"steps": 7}, {"steps": 20, "resume": True}):
        moved = run(structure=structure, repeat=None, **options).atoms.positions - atoms.positions
        assert_array_equal(moved[[0, 5]], 0)
        assert (np.abs(moved[1:5]) > 0).all()


def test_ctrl_c_finishes_the_step_and_keeps_the_state() -> None:
    whole = run()

    def interrupt(status: MDStatus) -> None:
        if status.step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    config = MDConfig(repeat=(2, 2, 2), steps=20, log_interval=1, trajectory_interval=5)
    before = signal.getsignal(signal.SIGINT)
    result = run_md(config, calculator=calculator(), report=interrupt)
    assert (result.step, result.finished) == (8, False)
    assert signal.getsignal(signal.SIGINT) == before
    resumed = run_md(replace(config, resume=True), calculator=calculator())
    assert_array_equal(resumed.atoms.positions, whole.atoms.positions)


def test_runs_outside_the_main_thread() -> None:
    found: list[MDResult] = []
    thread = threading.Thread(target=lambda: found.append(run(steps=3)))
    thread.start()
    thread.join()
    assert found[0].step == 3


class FailsLater(Calculator):
    """Lennard-Jones whose forces on two atoms become NaN after some calls."""

    implemented_properties = ["energy", "forces"]

    def __init__(self, calls: int):
        super().__init__()
        self.calls, self.inner = calls, calculator()

    def calculate(self, atoms: Atoms, properties: list[str], changes: list[str] = all_changes) -> None:
        super().calculate(atoms, properties, changes)
        forces = self.inner.get_forces(atoms)
        self.calls -= 1
        if self.calls < 0:
            forces[[3, 17], 1] = np.nan
        self.results = {"energy": self.inner.get_potential_energy(atoms), "forces": forces}


def test_forces_that_are_not_finite_stop_the_run_at_their_step() -> None:
    config = MDConfig(repeat=(2, 2, 2), steps=20, log_interval=1)
    with pytest.raises(
        DynamicsError, match=r"step 4: the forces on atoms 3, 17 \(2 in all\) .* in md.stopped.extxyz"
    ):
        run_md(config, calculator=FailsLater(4))
    stopped = read("md.stopped.extxyz")
    assert_allclose(stopped.positions, run(steps=4).atoms.positions, atol=1e-7)


def test_an_exploding_system_stops() -> None:
    atoms = bulk("Ag", cubic=True)
    atoms.positions[1] = atoms.positions[0] + [1.2, 0, 0]
    with pytest.raises(DynamicsError, match=r"temperature is [0-9]+ K, above max_temperature=5000 K"):
        run(structure=_exact(atoms), repeat=None)
    with pytest.raises(DynamicsError, match="stopped at step 0: .*max_temperature=100 K"):
        run(max_temperature=100.0)


def test_a_restart_file_of_another_system_or_none_is_refused() -> None:
    with pytest.raises(FileNotFoundError, match="no restart file md.restart.npz"):
        run(resume=True)
    run(steps=1)
    with pytest.raises(ValueError, match=r"holds 32 atoms that are not those of the structure \(4 atoms\)"):
        run(resume=True, repeat=(1, 1, 1))
    Path("md.restart.npz").write_bytes(b"PK rubbish")
    with pytest.raises(ValueError, match="damaged or not a restart file"):
        run(resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ensemble": "npt"}, "ensemble='npt' is not known; set nve or nvt"),
        ({"timestep": 0.0}, "timestep must be positive"),
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"repeat": (2, 2)}, r"repeat=\[2, 2\] must be three"),
        ({"resume": True, "restart": None}, "resume=true needs restart=FILE"),
    ],
)
def test_settings_are_checked_first(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MDConfig(**options)


def test_structures() -> None:
    assert len(starting_structure(MDConfig())) == 256
    assert len(starting_structure(MDConfig(structure="Cu", repeat=(1, 1, 2)))) == 8
    write("a.extxyz", [bulk("Ag"), bulk("Ag", cubic=True)])
    assert len(starting_structure(MDConfig(structure="a.extxyz"))) == 4  # the last frame, once
    Path("b.extxyz").write_text("nonsense")
    with pytest.raises(ValueError, match="ASE cannot read a structure from b.extxyz"):
        starting_structure(MDConfig(structure="b.extxyz"))
    with pytest.raises(FileNotFoundError, match="'silber' is neither a file .* nor a chemical symbol"):
        starting_structure(MDConfig(structure="silber"))


def test_command_reports_speed_conservation_and_files(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gnnmd.interfaces.ase_md.GNNMDCalculator", lambda *args, **options: calculator())
    assert md(MDConfig(repeat=(2, 2, 2), steps=20, log_interval=5)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"step +0/20  T +\d+\.\d K  E_tot +-\d\.\d{6} eV/atom", lines[1])
    assert re.fullmatch(r"step +20/20 .* ns/day  ETA +0:00", lines[5])
    assert re.search(r"drift -?\d+\.\d{4} meV/atom/ps, rms about it \d+\.\d{4} meV/atom", lines[-2])
    assert lines[-1] == "wrote md.extxyz, md.restart.npz"


def test_command_line_fills_the_configuration_and_refuses_misspelt_keys(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[MDConfig] = []
    monkeypatch.setattr("gnnmd.interfaces.commands.md", lambda config: found.append(config) or 0)
    assert main(["md", "ensemble=nvt", "repeat=[2,2,3]", "restart=null", "timestep=2"]) == 0
    assert found == [MDConfig(ensemble="nvt", repeat=(2, 2, 3), restart=None, timestep=2.0)]
    for argument, message in [
        ("temprature=300", "unknown key 'temprature', did you mean 'temperature'?"),
        ("steps=many", "steps=many: Value 'many' .* could not be converted to Integer"),
        ("ensemble=nvr", "ensemble=nvr: not one of nve, nvt, did you mean 'nv[et]'"),
        ("repeat=[1,2]", r"repeat=\[1, 2\] must be three positive integers"),
    ]:
        assert main(["md", argument]) == 1
        assert re.search(message, capsys.readouterr().err)
    assert main(["md", "--help"]) == 0
    assert "resume=False" in capsys.readouterr().out
