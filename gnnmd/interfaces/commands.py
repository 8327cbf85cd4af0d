"""The command ``gnnmd md``."""

import sys
from pathlib import Path

import numpy as np

from gnnmd.interfaces.ase_md import MDConfig, MDResult, MDStatus, run_md
from gnnmd.units import MEV


def md(config: MDConfig) -> int:
    """Run molecular dynamics and report on the terminal; returns 130 if it was interrupted, else 0.

    The line of progress stays in its place on a terminal and is repeated everywhere else.
    """
    live = sys.stdout.isatty()
    run = f"{config.temperature:g} K, {config.steps} steps of {config.timestep:g} fs"
    print(f"{config.ensemble} of {config.structure} with {config.model}: {run}")

    def report(status: MDStatus) -> None:
        print(f"\r{status}\x1b[K" if live else status, end="" if live else "\n", flush=True)

    result = run_md(config, report=report)
    print("\n" * live + _summary(config, result))
    return 0 if result.finished else 130


def _summary(config: MDConfig, result: MDResult) -> str:
    lines = [f"{result.step} steps, {len(result.atoms)} atoms, {result.ns_per_day:.3f} ns/day"]
    if len(result.time) > 2:
        lines.append(f"temperature {result.temperature.mean():.1f} +- {result.temperature.std():.1f} K")
        if config.ensemble == "nve":
            picoseconds, total = result.time / 1000, result.total * MEV
            slope, start = np.polyfit(picoseconds, total, 1)
            rms = np.std(total - start - slope * picoseconds)
            lines.append(f"total energy: drift {slope:.4f} meV/atom/ps, rms about it {rms:.4f} meV/atom")
    files = [name for name in (config.trajectory, config.restart) if name and Path(name).is_file()]
    if files:
        lines.append(f"wrote {', '.join(files)}")
    if not result.finished:
        again = (
            "with the same settings and resume=true"
            if config.restart
            else "from the start: there is no restart file"
        )
        lines.append(f"interrupted at step {result.step} of {config.steps}; run it again {again}")
    return "\n".join(lines)
