"""``gnnmd demo``: from the built-in data to a potential to molecular dynamics, and one page that shows it."""

import argparse
import csv
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from ase.calculators.emt import EMT
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gnnmd import __version__
from gnnmd.config import load_config
from gnnmd.data.silver import load_silver
from gnnmd.demo.dynamics import constant_energy, constant_temperature, crystal, peak
from gnnmd.demo.report import Check, Curves, draw, write_page
from gnnmd.interfaces.ase import GNNMDCalculator
from gnnmd.predict import PredictUnit
from gnnmd.units import MEV

#: Cubic cells along each axis: 256 atoms.
REPEAT = 4
#: K, of both the constant-energy and the constant-temperature runs.
TEMPERATURE = 300.0
#: fs; the fluctuation of the total energy must grow fourfold from the first to the second.
TIMESTEPS = (5.0, 10.0)
#: ps: constant energy; constant temperature before and during sampling.
LENGTHS = (5.0, 1.0, 4.0)
#: meV/A and meV/atom on the test split.
ERROR_LIMITS = (60.0, 5.0)


def demo(arguments: Sequence[str]) -> int:
    """Run the demo; returns 0 if every check passed."""
    parser = argparse.ArgumentParser(
        prog="gnnmd demo",
        description="Train on the built-in silver set (about 3 minutes on two CPU cores), run NVE and NVT "
        "dynamics of 256 atoms next to EMT (about 3 minutes), write a report.",
    )
    parser.add_argument("--out", type=Path, default=Path("demo_report"), help="folder of the report")
    parser.add_argument("--model", help="a checkpoint to use instead of training one, for example 'silver'")
    parser.add_argument("--scale", type=float, default=1.0, help="length of the dynamics, 1 = full")
    options = parser.parse_args(arguments)
    if options.scale <= 0:
        parser.error("--scale must be positive")
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    started = time.monotonic()

    facts = {"gnnmd": __version__, "torch": torch.__version__, "threads": str(torch.get_num_threads())}
    learning = None
    if options.model is None:
        console.rule("1/3 training")
        checkpoint, learning = _train(options.out)
        facts["training"] = f"{time.monotonic() - started:.0f} s"
    else:
        checkpoint = options.model
    facts["model"] = os.fspath(checkpoint)

    console.rule("2/3 test set")
    unit = PredictUnit.from_checkpoint(checkpoint)
    forces, error_checks = _test_errors(unit)
    for check in error_checks:
        console.print(f"{check.name}: {check.value} ({check.threshold})")

    console.rule("3/3 molecular dynamics")
    dynamics_started = time.monotonic()
    traces, profiles, md_checks = _dynamics(unit, options.scale, console)
    for check in md_checks:
        console.print(f"{check.name}: {check.value} ({check.threshold})")
    facts["dynamics"] = f"{time.monotonic() - dynamics_started:.0f} s"

    checks = [*error_checks, *md_checks]
    draw(Curves(learning, forces, traces, profiles), options.out / "report.png")
    write_page(options.out / "index.html", checks, facts, "report.png")
    failed = [check.name for check in checks if not check.passed]
    console.rule()
    console.print(f"report: {options.out / 'index.html'}, picture: {options.out / 'report.png'}")
    console.print(
        f"{time.monotonic() - started:.0f} s; " + (f"FAILED: {', '.join(failed)}" if failed else "all passed")
    )
    return 1 if failed else 0


def _train(out: Path) -> tuple[Path, np.ndarray]:
    """Train the preset; returns the checkpoint and ``[epochs, 2]`` epoch and validation force MAE (meV/A)."""
    from gnnmd.training.folder import METRICS
    from gnnmd.training.run import train

    result = train(load_config(["experiment=silver_fast", f"runs={out / 'runs'}"]))
    if result.interrupted:
        raise KeyboardInterrupt
    with (result.folder / METRICS).open() as file:
        rows = [
            (row["epoch"], row["val_forces_mae"]) for row in csv.DictReader(file) if row["val_forces_mae"]
        ]
    return result.checkpoint, np.array(rows, float) * (1, MEV)


def _test_errors(unit: PredictUnit) -> tuple[np.ndarray, list[Check]]:
    """Return reference and predicted force components ``[2, M]`` of the test split, and two checks."""
    frames = load_silver("test")
    prediction = unit.predict(frames)
    reference = np.concatenate([frame.get_forces() for frame in frames]).ravel()
    predicted = prediction.forces.numpy().ravel()
    sizes = np.array([len(frame) for frame in frames])
    energies = np.array([frame.get_potential_energy() for frame in frames])
    force_error = MEV * float(np.abs(predicted - reference).mean())
    energy_error = MEV * float(np.abs((prediction.energy.numpy() - energies) / sizes).mean())
    force_limit, energy_limit = ERROR_LIMITS
    return np.stack([reference, predicted]), [
        Check(
            "force error (MAE)",
            f"{force_error:.1f} meV/Å",
            f"at most {force_limit:g}",
            force_error <= force_limit,
        ),
        Check(
            "energy error (MAE)",
            f"{energy_error:.2f} meV/atom",
            f"at most {energy_limit:g}",
            energy_error <= energy_limit,
        ),
    ]


def _dynamics(
    unit: PredictUnit, scale: float, console: Console
) -> tuple[dict, dict[str, tuple[np.ndarray, np.ndarray]], list[Check]]:
    """Run model and EMT from the same start; returns energy traces, g(r) and the checks."""
    nve, before, sampled = (scale * length for length in LENGTHS)
    calculators: dict[str, Callable] = {"model": lambda: GNNMDCalculator(unit), "EMT": EMT}
    nvt_steps = 200 * (before + sampled)
    nve_steps = sum(1000 * nve / timestep for timestep in TIMESTEPS) + 1000 * nve / TIMESTEPS[0]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    profiles, temperatures, traces = {}, {}, {}
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=round(2 * nvt_steps + nve_steps))

        def advance(steps: int) -> None:
            progress.advance(task, steps)

        start = crystal(REPEAT, TEMPERATURE, seed=0)
        for label, make in calculators.items():
            progress.update(task, description=f"NVT, {label}")
            *profile, temperatures[label], last = constant_temperature(
                start, make(), TEMPERATURE, (before, sampled), seed=1, progress=advance
            )
            profiles[label] = (profile[0], profile[1])
            if label == "model":
                equilibrated = last
        for label, timestep in [*(("model", dt) for dt in TIMESTEPS), ("EMT", TIMESTEPS[0])]:
            progress.update(task, description=f"NVE, {label}, {timestep:g} fs")
            traces[f"{label}, {timestep:g} fs"] = constant_energy(
                equilibrated, calculators[label](), timestep, nve, progress=advance
            )
    short, long = (traces[f"model, {timestep:g} fs"] for timestep in TIMESTEPS)
    order = long.rms / short.rms
    (r, height), (r_emt, height_emt) = peak(*profiles["model"]), peak(*profiles["EMT"])
    difference = float(np.abs(profiles["model"][1] - profiles["EMT"][1]).max())
    return (
        traces,
        profiles,
        [
            Check(
                "NVE: energy fluctuation, 10 fs over 5 fs",
                f"{order:.2f}",
                "4.0 ± 0.6 (second-order integrator, exact forces)",
                abs(order - 4) <= 0.6,
            ),
            Check(
                "NVE: fluctuation at 5 fs against EMT",
                f"{short.rms / traces['EMT, 5 fs'].rms:.2f}",
                "0.5 to 2",
                0.5 <= short.rms / traces["EMT, 5 fs"].rms <= 2,
            ),
            Check(
                "NVE: drift over the run / std of kinetic energy",
                f"{short.drift_ratio:.4f}",
                "below 0.1",
                short.drift_ratio < 0.1,
            ),
            Check(
                "NVT: mean temperature",
                f"{temperatures['model']:.0f} K",
                f"{TEMPERATURE:g} ± 20 K",
                abs(temperatures["model"] - TEMPERATURE) <= 20,
            ),
            Check(
                "g(r): first peak, position", f"{r - r_emt:+.4f} Å from EMT", "± 0.01", abs(r - r_emt) <= 0.01
            ),
            Check(
                "g(r): first peak, height",
                f"{100 * (height / height_emt - 1):+.1f} % from EMT, largest difference {difference:.2f}",
                "± 3 %",
                abs(height / height_emt - 1) <= 0.03,
            ),
        ],
    )
