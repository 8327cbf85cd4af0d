"""Reporters over restarts: every record once, every sum as if the run had not been interrupted."""

from pathlib import Path

import numpy as np
from ase.io import iread

from gnnmd.md import Simulation, shards
from gnnmd.md.reporters import MSD, RDF, Thermo, Trajectory, ZarrTrajectory, read_trajectory
from tests.md.jobs import Stop, unit_on
from tests.md.test_restart import start, stopped


def reporters(folder: str):
    return [
        Thermo(path=f"{folder}/thermo.csv", interval=4, live=False),
        Trajectory(f"{folder}/frames.extxyz", interval=6),
        ZarrTrajectory(f"{folder}/frames.zarr", interval=6),
        MSD(interval=2, lags=10, origins=5),
        RDF(interval=4, r_max=5.0, bins=50),
    ]


def uninterrupted(group, folder: str):
    mine = reporters(folder)
    start(group, reporters=mine).run(60)
    return mine[-2].result(), mine[-1].result()


def begun(group, folder: str) -> None:
    options = {"restart": f"{folder}/r", "restart_interval": 10, "keep": 3}
    stopped(start(group, reporters=[*reporters(folder), Stop(23)], **options), 60)


def ended(group, folder: str):
    """Go on to step 41, and once more from 30 as if killed then: there are records that no restart knows."""
    stopped(Simulation.resume(f"{folder}/r", unit_on(group), reporters=[*reporters(folder), Stop(41)]), 37)
    mine = reporters(folder)
    path = shards.step_folder(Path(folder) / "r", 30)
    Simulation.resume(path, unit_on(group), reporters=mine).run(30)
    return mine[-2].result(), mine[-1].result()


def test_records_and_sums_are_those_of_a_run_that_was_not_interrupted(pool, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = pool.run(2, uninterrupted, str(tmp_path / "whole"))[0]
    pool.run(3, begun, str(tmp_path / "parts"))
    parts = pool.run(2, ended, str(tmp_path / "parts"))[0]
    np.testing.assert_allclose(parts[0].msd, whole[0].msd, rtol=1e-9)
    np.testing.assert_allclose(parts[1].g, whole[1].g, rtol=1e-9)
    one, two = (
        np.genfromtxt(tmp_path / n / "thermo.csv", delimiter=",", names=True) for n in ("whole", "parts")
    )
    assert list(one["step"]) == list(two["step"]) == list(range(0, 61, 4))
    one, two = (list(iread(tmp_path / n / "frames.extxyz")) for n in ("whole", "parts"))
    assert [a.info["step"] for a in one] == [a.info["step"] for a in two] == list(range(0, 61, 6))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a.positions, b.positions, rtol=0, atol=1e-7)
    one, two = (read_trajectory(tmp_path / n / "frames.zarr") for n in ("whole", "parts"))
    np.testing.assert_allclose(one.read("positions"), two.read("positions"), rtol=0, atol=1e-4)
