"""Files and callbacks of a simulation: every step once, in the order of the input, whoever wrote it."""

import errno
import os
import pickle
import pkgutil
import threading
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import iread
from numpy.testing import assert_allclose

from gnnmd.md.barostats import StochasticCell
from gnnmd.md.reporters import Callback, Frame, Thermo, Trajectory, ZarrTrajectory, read_trajectory
from gnnmd.md.reporters.extxyz import cut_extxyz
from gnnmd.md.reporters.thermo import live_line
from gnnmd.parallel import RankFailure, Ranks
from tests.md.ranks import alloy, run, run_on_pool
from tests.parallel.pool import WorkerPool

NAMES = ("positions", "velocities", "forces")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that fail leave their last good state in the working directory."""
    monkeypatch.chdir(tmp_path)


def records(folder: Path, *, chunk: int | None = 17) -> list:
    return [
        Thermo(4, folder / "md.csv", live=False),
        Trajectory(folder / "md.extxyz", 6),
        ZarrTrajectory(folder / "md.zarr", 6, dtype="float64", forces=True, chunk=chunk),
    ]


def rows_of(folder: Path) -> np.ndarray:
    return np.genfromtxt(folder / "md.csv", delimiter=",", names=True)


def in_callback(runs: tuple[int, ...]) -> list[Frame]:
    frames: list[Frame] = []
    watch = Callback(frames.append, 6, gather=NAMES, stress=True)
    for _, row in run(None, alloy(), [watch], runs)[1]:
        watch.show(row)
    return frames


@pytest.mark.parametrize("size", [1, 4])
def test_files_hold_what_a_callback_sees_on_one_rank(pool: WorkerPool, tmp_path: Path, size: int):
    answers = pool.run(size, run_on_pool, alloy(), records(tmp_path), (15, 33), {})
    assert answers[0][2] > 0  # rebuilds
    frames = in_callback((15, 33))
    steps = [0, 6, 12, 15, 18, 24, 30, 33]
    assert [frame.step for frame in frames] == steps

    table = rows_of(tmp_path)
    assert table["step"].tolist() == [0, 4, 8, 12, 15, 16, 20, 24, 28, 32, 33]
    assert_allclose(table["time_fs"], 5.0 * table["step"])
    for frame in frames:
        row = table[table["step"] == frame.step]
        if len(row):
            names = {"temperature_K": "temperature", "total_eV": "total_energy", "pressure_GPa": "pressure"}
            for column, scalar in names.items():
                assert_allclose(row[column], frame.scalars[scalar], rtol=1e-9)

    written, zarr = list(iread(tmp_path / "md.extxyz")), read_trajectory(tmp_path / "md.zarr")
    assert [atoms.info["step"] for atoms in written] == zarr.steps.tolist() == steps
    for images, atol in ((written, 1e-7), (zarr, 1e-11)):
        for atoms, frame in zip(images, frames, strict=True):
            same_atoms(atoms, frame, atol)
    assert [atoms.info["step"] for atoms in zarr[-2:]] == [30, 33]
    assert zarr[-1].info["time_fs"] == 165.0
    chosen = zarr.read("positions", slice(1, None, 2), [40, 3])
    assert_allclose(chosen, [frame.atoms.positions[[40, 3]] for frame in frames[1::2]], atol=1e-11)
    assert len(list((tmp_path / "md.zarr/positions/c/0").iterdir())) == 5  # 80 atoms in chunks of 17


def same_atoms(atoms: Atoms, frame: Frame, atol: float) -> None:
    assert atoms.get_chemical_symbols() == frame.atoms.get_chemical_symbols()
    assert_allclose(atoms.cell.array, frame.atoms.cell.array, atol=1e-7)
    assert_allclose(atoms.positions, frame.atoms.positions, atol=atol)
    assert_allclose(atoms.get_momenta(), frame.atoms.get_momenta(), atol=max(atol, 1e-9))
    assert_allclose(atoms.get_forces(), frame.atoms.get_forces(), atol=max(atol, 1e-9))
    assert_allclose(atoms.get_stress(), frame.atoms.get_stress(), atol=max(atol, 1e-9))
    assert_allclose(atoms.get_potential_energy(), frame.atoms.get_potential_energy(), atol=1e-7)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_came_after_the_restart_is_cut_and_comes_again(pool: WorkerPool, tmp_path: Path, size: int):
    """Written by two ranks up to step 33; the restart is of step 24, and the run ends earlier than before."""
    pool.run(2, run_on_pool, alloy(), records(tmp_path), (33,), {})
    with (tmp_path / "md.csv").open("a") as table, (tmp_path / "md.extxyz").open("a") as frames:
        table.write("36,18")  # killed while it wrote
        frames.write('80\nLattice="1 0 0 0 1 0 0 0 1" step=36\nAg 1.0')
    before = read_trajectory(tmp_path / "md.zarr")[0]
    pool.run(size, run_on_pool, alloy(), records(tmp_path, chunk=None), (27,), {"step": 24})
    assert rows_of(tmp_path)["step"].tolist() == [0, 4, 8, 12, 16, 20, 24, 27]
    frames = read_trajectory(tmp_path / "md.zarr")
    expected = [0, 6, 12, 18, 24, 27]
    assert frames.steps.tolist() == expected
    assert [atoms.info["step"] for atoms in iread(tmp_path / "md.extxyz")] == expected
    assert_allclose(frames[0].positions, before.positions, rtol=0)
    assert np.isfinite(frames.read("positions")).all()


def test_a_simulation_that_begins_anew_replaces_files_but_nothing_else(tmp_path: Path):
    for last in (12, 6):
        run(None, alloy(), records(tmp_path), (0, last))
    assert rows_of(tmp_path)["step"].tolist() == [0, 4, 6]
    assert read_trajectory(tmp_path / "md.zarr").steps.tolist() == [0, 6]
    assert [atoms.info["step"] for atoms in iread(tmp_path / "md.extxyz")] == [0, 6]

    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.tex").write_text("42")
    with pytest.raises(ValueError, match="precious is not a trajectory of gnnmd"):
        run(None, alloy(), [ZarrTrajectory(tmp_path / "precious")], (0,))
    assert (tmp_path / "precious/thesis.tex").read_text() == "42"


def test_files_of_another_simulation_are_not_continued(tmp_path: Path):
    run(None, alloy(), records(tmp_path), (6,))
    with pytest.raises(ValueError, match=r"holds forces and positions and velocities of 80 atoms.* of 79"):
        run(None, alloy()[1:], [ZarrTrajectory(tmp_path / "md.zarr", forces=True)], (8,), step=6)
    changing = StochasticCell(timestep=5.0, temperature=300.0)
    with pytest.raises(ValueError, match="has the columns 'step,time_fs"):
        run(None, alloy(), [Thermo(4, tmp_path / "md.csv", live=False)], (8,), step=6, integrator=changing)
    with pytest.raises(FileNotFoundError, match="there is no trajectory"):
        read_trajectory(tmp_path / "nothing.zarr")


def test_wrapped_frames_and_fewer_columns(tmp_path: Path):
    atoms = alloy()
    atoms.positions += atoms.cell[0]
    plain = Trajectory(tmp_path / "plain.extxyz", wrap=True, velocities=False, forces=False, stress=False)
    run(None, atoms, [plain, Trajectory(tmp_path / "far.extxyz")], (0,))
    wrapped, far = next(iread(tmp_path / "plain.extxyz")), next(iread(tmp_path / "far.extxyz"))
    assert_allclose(far.positions, atoms.positions, atol=1e-7)
    inside = wrapped.get_scaled_positions(wrap=False)
    assert -1e-7 < inside.min() < inside.max() < 1 + 1e-7
    assert "momenta" not in wrapped.arrays
    assert set(wrapped.calc.results) == {"energy"}


def test_a_changing_cell_has_its_lengths_in_the_table(tmp_path: Path):
    integrator = StochasticCell(
        timestep=5.0, temperature=300.0, pressure=5.0, pressure_time_constant=100.0, cell="anisotropic"
    )
    _, _, loop = run(
        None, alloy(), [Thermo(10, tmp_path / "md.csv", live=False)], (20,), integrator=integrator
    )
    table = rows_of(tmp_path)
    lengths = np.linalg.norm(loop.state.cell.numpy(), axis=1)
    assert_allclose([table[name][-1] for name in ("a_A", "b_A", "c_A")], lengths, rtol=1e-9)
    assert table["volume_A3"][-1] == pytest.approx(float(loop.state.volume))
    assert table["a_A"][-1] != table["a_A"][0]


def without_space(function: Callable) -> Callable:
    """Return a function that finds the disk full when it is called beside the simulation."""

    def found_full(*args: object, **kwargs: object) -> object:
        if threading.current_thread().name.startswith("gnnmd-writer"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*args, **kwargs)

    return found_full


def full_disk(group, reporter, place: str, rank: int) -> str:
    """Run with one rank that cannot write to the disk; return what this rank was told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(reporter.path.parent)
        if Ranks(group).rank == rank:
            patch.setattr(place, without_space(pkgutil.resolve_name(place)))
        try:
            run(group, alloy(), [reporter], (8,))
        except (OSError, RankFailure) as error:
            return str(error)
    return "nothing was raised"


@pytest.mark.parametrize(
    ("reporter", "place", "rank"),
    [
        (Trajectory("md.extxyz", 4), "pathlib.Path.open", 0),
        (ZarrTrajectory("md.zarr", 4, chunk=40), "gnnmd.md.reporters.zarr._write_rows", 1),
    ],
    ids=["extxyz", "zarr"],
)
def test_a_full_disk_ends_the_run_on_every_rank_and_says_what_to_do(
    pool: WorkerPool, tmp_path: Path, reporter, place, rank
):
    reporter.path = tmp_path / reporter.path
    for message in pool.run(2, full_disk, reporter, place, rank):
        assert f"rank {rank} of 2 failed while writing {reporter.path}" in message
        assert f"{reporter.path} could not be written at step 0: No space left on device" in message
        assert "Make room or choose another path" in message


def test_a_row_that_does_not_fit_the_disk_is_told_though_a_part_of_it_does(tmp_path: Path):
    class Almost(FileIO):
        """The third write fits by half, and tells only its number of bytes; then the disk is full."""

        left = 3

        def write(self, content) -> int:
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(content if self.left else content[: len(content) // 2])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gnnmd.md.reporters.thermo._opened", lambda *_: (Almost(tmp_path / "md.csv", "w"), -1))
        with pytest.raises(OSError, match="could not be written at step 4: No space left"):
            run(None, alloy(), [Thermo(2, tmp_path / "md.csv", live=False)], (20,))


def test_extxyz_is_cut_behind_complete_frames_only(tmp_path: Path):
    run(None, alloy(), [Trajectory(tmp_path / "md.extxyz", 2)], (6,))
    whole = (tmp_path / "md.extxyz").read_bytes()
    assert cut_extxyz(tmp_path / "md.extxyz", 100) == 6
    assert (tmp_path / "md.extxyz").read_bytes() == whole
    (tmp_path / "md.extxyz").write_bytes(whole[:-5])
    assert cut_extxyz(tmp_path / "md.extxyz", 100) == 4
    assert cut_extxyz(tmp_path / "md.extxyz", 3) == 2
    assert len(list(iread(tmp_path / "md.extxyz"))) == 2
    assert cut_extxyz(tmp_path / "md.extxyz", -1) == -1


def test_a_callback_leaves_its_function_at_home():
    seen: list[Frame] = []
    watch = Callback(seen.append, 5)
    away = pickle.loads(pickle.dumps(watch))
    assert away.function is None
    for _, row in run(None, alloy(), [away], (5,))[1]:
        watch.show(row)
    assert [frame.step for frame in seen] == [0, 5]
    assert seen[1].atoms.get_temperature() == pytest.approx(seen[1].scalars["temperature"], rel=0.05)
    assert "pressure" not in seen[1].scalars
    assert "forces" not in seen[1].atoms.calc.results


def test_the_live_line_says_where_the_simulation_is(capsys: pytest.CaptureFixture[str]):
    row = {
        "step": 500,
        "last_step": 10_000,
        "n_atoms": 4000,
        "temperature_K": 301.2,
        "total_eV": -11_000.0,
        "pressure_GPa": 0.5,
        "ns_per_day": 4.32,
        "katom_step_per_s": 40.0,
    }
    Thermo(live=True).show(row)
    line = capsys.readouterr().out
    assert line == live_line(row) + "\n"
    for part in ("500/10000", "301.2 K", "-2.75000 eV/atom", "4.320 ns/day", "40.00 katom", "ETA 0:15:50"):
        assert part in line
    unknown = {**row, "pressure_GPa": float("nan"), "katom_step_per_s": float("nan")}
    assert "GPa" not in live_line(unknown)
    assert "ETA" not in live_line(unknown)
    Thermo(live=False).show(row)
    assert capsys.readouterr().out == ""
