import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.constraints import FixAtoms
from ase.io import read, write
from numpy.testing import assert_allclose, assert_array_equal

from gnnmd import InferenceSettings, PredictUnit
from gnnmd.cli import main
from gnnmd.md import SimulationError
from gnnmd.md.reporters import Thermo, read_trajectory
from gnnmd.md.run import MDResult, run_md
from gnnmd.md.settings import MDConfig
from tests.lennard_jones import lennard_jones


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def unit(workers: int | None = None) -> PredictUnit:
    settings = InferenceSettings(dtype="float64")
    return PredictUnit(lennard_jones(), device="cpu", settings=settings, workers=workers)


def config(**options: object) -> MDConfig:
    defaults: dict = {
        "repeat": (2, 2, 2),
        "steps": 20,
        "log_interval": 1,
        "trajectory_interval": 5,
        "restart_interval": 10,
        "skin": 0.5,
    }
    return MDConfig(**{**defaults, **options})


def run(**options: object) -> MDResult:
    return run_md(config(**options), unit=unit())


def steps(path: str = "md.extxyz") -> list[int]:
    return [frame.info["step"] for frame in read(path, index=":")]


def rows(path: str = "md.csv") -> np.ndarray:
    """Return all columns but the speed."""
    return np.loadtxt(path, delimiter=",", skiprows=1)[:, :-2]


def exact(atoms: Atoms) -> str:
    write("start.traj", atoms)
    return "start.traj"


def test_a_run_writes_what_it_computed() -> None:
    result = run(ensemble="nvt")
    assert steps() == [0, 5, 10, 15, 20]
    last, atoms = read("md.extxyz", index=-1), result.simulation.atoms
    assert_allclose(last.positions, atoms.positions, atol=1e-7)
    assert_allclose(last.get_momenta(), atoms.get_momenta(), atol=1e-7)
    assert_allclose(last.get_forces(), atoms.get_forces(), atol=1e-7)
    assert last.info["time_fs"] == 100
    table = rows()
    assert_array_equal(table[:, 0], np.arange(21))
    assert table[-1, 3] == pytest.approx(last.get_potential_energy())
    assert (result.simulation.step, result.code) == (20, 0)


def test_a_run_says_what_it_was() -> None:
    run(steps=3)
    run(steps=6, resume=True)
    record = json.loads(Path("run.json").read_text())
    assert (record["kind"], record["state"], record["results"]["step"]) == ("md", "finished", 6)
    assert record["config"]["timestep"] == 5.0
    assert [session["state"] for session in record["sessions"]] == ["finished", "finished"]


@pytest.mark.parametrize("thermostat", ["none", "langevin", "bussi", "nose_hoover"])
def test_a_resumed_run_is_the_run_that_was_never_interrupted(thermostat: str) -> None:
    options = {} if thermostat == "none" else {"ensemble": "nvt", "thermostat": thermostat}
    whole = run(trajectory="whole.extxyz", log="whole.csv", restart=None, **options)
    run(steps=12, **options)
    resumed = run(resume=True, **options)
    assert_array_equal(resumed.simulation.atoms.positions, whole.simulation.atoms.positions)
    assert_array_equal(resumed.simulation.atoms.get_momenta(), whole.simulation.atoms.get_momenta())
    # Step 12 was the last of a run, and reported for that.
    assert_array_equal(rows(), rows("whole.csv"))
    assert [step for step in steps() if step != 12] == steps("whole.extxyz")
    value, error = (r.averages.result()["temperature"].value for r in (resumed, whole))
    assert value == pytest.approx(error, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"timestep": 2.0}, "timestep=5.0"),
        ({"ensemble": "npt"}, "ensemble=nvt"),
        ({"structure": "Au", "friction": 0.1}, "structure=Ag, friction=0.01"),
        ({"repeat": (3, 2, 2)}, r"repeat=\(2, 2, 2\)"),
        ({"dtype": "float64"}, "dtype=float32"),
        ({"seed": 1}, "seed=0"),
    ],
)
def test_a_run_is_not_resumed_as_another_one(options: dict, named: str) -> None:
    run(steps=2, ensemble="nvt")
    with pytest.raises(ValueError, match=f"md.restart has {named}, this .*structure=<its traj") as refused:
        run(**{"ensemble": "nvt", **options}, resume=True)
    assert "\n" not in str(refused.value)
    assert json.loads(Path("run.json").read_text())["state"] == "finished"


def test_a_resumed_run_may_be_looked_at_in_other_ways() -> None:
    run(steps=2)
    last = run(
        resume=True, steps=5, log="more.csv", log_interval=2, trajectory=None, keep=1, skin=1.0, edge_chunk=9
    )
    assert last.simulation.step == 5
    with pytest.raises(ValueError, match="written with another potential"):
        run_md(config(resume=True), unit=PredictUnit(lennard_jones(), device="cpu"))  # float32


def test_a_resumed_command_begins_with_the_configuration_of_its_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["repeat=[2,2,2]", "ensemble=nvt", "temperature=700", "log=null", "trajectory=null"]
    assert main(["md", *arguments, "restart=a", "steps=2", "device=cpu", "dtype=float64"]) == 0
    assert main(["md", "resume=true", "restart=a", "steps=4", "device=cpu", "temperature=300"]) == 1
    assert "the run in a has temperature=700.0, this configuration has not" in capsys.readouterr().err
    assert main(["md", "resume=true", "restart=a", "steps=4", "device=cpu"]) == 0
    assert "going on from a with silver to step 4" in capsys.readouterr().out
    assert {path.name for path in Path().iterdir()} == {"a", "run.json"}
    Path("a/config.yaml").write_text("{")
    assert main(["md", "resume=true", "restart=a", "steps=4", "device=cpu"]) == 1
    assert "a/config.yaml: not a YAML file" in capsys.readouterr().err
    Path("a/config.yaml").unlink()  # a restart that a script has written says only what it holds
    assert main(["md", "resume=true", "restart=a", "steps=4", "device=cpu", "dtype=float64"]) == 0


def test_constraints_of_the_structure_hold_also_after_resuming() -> None:
    atoms = bulk("Ag", cubic=True) * 2
    atoms.set_constraint(FixAtoms([0, 5]))
    for options in ({"steps": 7}, {"steps": 20, "resume": True}):
        end = run(structure=exact(atoms), repeat=None, **options).simulation.atoms
        moved = end.positions - atoms.positions
        assert_array_equal(moved[[0, 5]], 0)
        assert (np.abs(moved[1:5]) > 0).all()
    last = read("md.extxyz")  # from which a new run may start
    assert last.constraints[0].index.tolist() == [0, 5]
    assert_allclose(
        last.get_forces(apply_constraint=False), end.get_forces(apply_constraint=False), atol=1e-7
    )


def test_ctrl_c_finishes_the_step_and_keeps_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(trajectory=None, log=None, restart=None)

    def interrupt(self: Thermo, row: dict) -> None:
        if row["step"] == 7:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("gnnmd.md.simulation._HEAR", 0.0)  # asks after every step
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Thermo, "show", interrupt)
        stopped = run()
    assert stopped.code == 130
    assert 7 <= stopped.simulation.step < 20
    assert signal.getsignal(signal.SIGINT) == before
    resumed = run(resume=True)
    assert_array_equal(resumed.simulation.atoms.positions, whole.simulation.atoms.positions)


def test_workers_write_a_large_trajectory_together() -> None:
    with unit(workers=2) as two:
        end = run_md(config(trajectory="md.zarr"), unit=two).simulation.atoms
    frames = read_trajectory("md.zarr")
    assert len(frames) == 5
    assert_allclose(frames[-1].positions, end.positions, atol=1e-4)


@pytest.mark.parametrize("barostat", ["stochastic", "mtk"])
def test_a_compressed_crystal_expands_at_constant_pressure(barostat: str) -> None:
    atoms = bulk("Ag", cubic=True) * 3
    atoms.set_cell(atoms.cell * 0.97, scale_atoms=True)
    run(
        ensemble="npt",
        barostat=barostat,
        structure=exact(atoms),
        repeat=None,
        pressure_time_constant=200.0,
        steps=60,
        log_interval=10,
    )
    volume = rows()[:, 8]
    assert volume[-1] > 1.01 * volume[0]


def test_minimisation_ends_where_forces_are_small() -> None:
    atoms = bulk("Ag", cubic=True) * 2
    atoms.rattle(0.1, seed=0)
    result = run(ensemble="minimize", structure=exact(atoms), repeat=None, steps=500, max_force=0.02)
    assert result.code == 0
    assert result.simulation.step < 500
    assert np.abs(result.simulation.atoms.get_forces()).max() < 0.02


def test_the_bath_follows_a_ramp() -> None:
    result = run(ensemble="nvt", thermostat="bussi", time_constant=10.0, final_temperature=900.0, steps=200)
    table = rows()
    assert result.code == 0
    assert table[150:, 2].mean() > 1.5 * table[:50, 2].mean()


def test_an_exploding_system_stops() -> None:
    atoms = bulk("Ag", cubic=True)
    atoms.positions[1] = atoms.positions[0] + [1.2, 0, 0]
    with pytest.raises(SimulationError, match="temperature is .* above 5000 K"):
        run(structure=exact(atoms), repeat=None)


def test_a_new_run_does_not_destroy_an_old_one() -> None:
    run(steps=5)
    with pytest.raises(FileExistsError, match="md.restart holds the restarts .* resume=true"):
        run()
    assert steps() == [0, 5]
    with pytest.raises(FileNotFoundError, match="other.restart"):
        run(resume=True, restart="other.restart")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestep": 0.0}, "timestep must be positive"),
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"repeat": (2, 2)}, r"repeat=\[2, 2\] must be three"),
        ({"resume": True, "restart": None}, "resume=true needs restart=FOLDER"),
        ({"log_interval": 0}, "log_interval must be at least 1"),
        ({"ensemble": "nvt", "friction": -1.0}, "friction must not be negative"),
    ],
)
def test_settings_are_checked_first(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MDConfig(**options)


def test_command_reports_and_returns_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["md", "repeat=[2,2,2]", "steps=4", "log_interval=2", "dtype=float64", "device=cpu"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "nve of Ag with silver: 300 K, 4 steps of 5 fs"
    assert re.match(r"step 0/4  T +\d+\.\d K  E_tot +-?\d\.\d{5} eV/atom", lines[1])
    assert "wrote md.csv, md.extxyz, md.restart" in lines
    assert any(
        re.match(r"step 4, 0\.02 ps; 0 rebuilds \(skin 1 A\), \d readings, 0 repeats", x) for x in lines
    )
    assert main(arguments) == 1  # does not destroy what is there
    assert "add resume=true" in capsys.readouterr().err
    assert main([*arguments[:1], "steps=6", "resume=true", "device=cpu", "dtype=float64"]) == 0
    assert steps() == [0, 4, 6]


def test_command_line_fills_the_configuration_and_refuses_misspelt_keys(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[MDConfig] = []
    monkeypatch.setattr("gnnmd.md.run.md", lambda config: found.append(config) or 0)
    assert main(["md", "ensemble=nvt", "repeat=[2,2,3]", "restart=null", "timestep=2"]) == 0
    expected = MDConfig(ensemble="nvt", repeat=(2, 2, 3), restart=None, timestep=2.0)
    assert found == [replace(expected)]
    for argument, message in [
        ("temprature=300", "unknown key 'temprature', did you mean 'temperature'?"),
        ("steps=many", "steps=many: Value 'many' .* could not be converted to Integer"),
        ("ensemble=nvr", "ensemble=nvr: not one of nve, nvt.*, did you mean 'nv[et]'"),
        ("repeat=[1,2]", r"repeat=\[1, 2\] must be three positive integers"),
    ]:
        assert main(["md", argument]) == 1
        assert re.search(message, capsys.readouterr().err)
    assert main(["md", "--help"]) == 0
    assert "resume=False" in capsys.readouterr().out
