"""Small copper and silver crystals labelled by EMT, and the smallest configuration that trains on them."""

import io

import ase.io
import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from rich.console import Console

from gnnmd.data.datamodule import DataConfig
from gnnmd.models.escn_md import EscnMDConfig
from gnnmd.training.losses import LossConfig, TermConfig
from gnnmd.training.optim import OptimConfig
from gnnmd.training.schedule import ScheduleConfig
from gnnmd.training.settings import TrainConfig, TrainerConfig


def labelled(atoms, seed, stress=True):
    atoms = atoms.copy()
    atoms.rattle(0.15, seed=seed)
    atoms.calc = EMT()
    atoms.get_potential_energy()
    atoms.get_forces()
    if stress:
        atoms.get_stress()
    return atoms


def crystals(symbol, count, seed=0):
    return [labelled(bulk(symbol, "fcc", cubic=True), seed + i) for i in range(count)]


def molecules(count):
    return [labelled(molecule(name), i, stress=False) for i in range(count) for name in ("H2O", "CO2")]


def alloys(count):
    frames = []
    for i in range(count):
        atoms = bulk("Cu", "fcc", a=3.8, cubic=True)
        atoms.symbols[: 1 + i % 3] = "Ag"
        frames.append(labelled(atoms, 100 + i))
    return frames


@pytest.fixture(scope="session")
def frames(tmp_path_factory):
    """Files of labelled frames by name."""
    folder = tmp_path_factory.mktemp("frames")
    made = {
        "copper": crystals("Cu", 10),
        "copper_val": crystals("Cu", 3, seed=50),
        "alloy": alloys(6),
        "molecules": molecules(4),
    }
    for name, images in made.items():
        ase.io.write(folder / f"{name}.xyz", images)
    return {name: str(folder / f"{name}.xyz") for name in made}


@pytest.fixture
def config(frames, tmp_path):
    """Trains in a second: 10 copper crystals of 4 atoms, 5 steps per epoch."""
    return TrainConfig(
        name="test",
        runs=str(tmp_path / "runs"),
        model=EscnMDConfig(
            r_cut=4.0,
            lmax=1,
            mmax=1,
            channels=8,
            hidden_channels=8,
            edge_channels=8,
            num_layers=1,
            num_basis=8,
        ),
        data=DataConfig(train=frames["copper"], val=frames["copper_val"], max_frames=2),
        loss=LossConfig(stress=TermConfig(weight=0.1)),
        optim=OptimConfig(lr=0.01, schedule=ScheduleConfig(warmup=0.1)),
        trainer=TrainerConfig(max_epochs=3, device="cpu", progress="none"),
    )


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    """Leave out what takes half of a tiny run, unless a test asks for ``pictures``."""
    if "pictures" not in request.fixturenames:
        for name in ("save_parity_plot", "save_learning_curve"):
            monkeypatch.setattr(f"gnnmd.training.report.{name}", lambda *_: None)


@pytest.fixture
def pictures():
    """Draw."""


@pytest.fixture
def console():
    """Remember what is told."""
    return Console(record=True, width=200, file=io.StringIO(), highlight=False, markup=False, soft_wrap=True)


def columns(folder, *prefixes):
    """Return columns of metrics.csv as text: equal text is equal to the last digit."""
    header, *rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    chosen = [i for i, name in enumerate(header) if name.startswith(prefixes)]
    return np.array([[row[i] for i in chosen] for row in rows])
