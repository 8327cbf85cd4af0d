"""The demo's report: one figure, one HTML page, every number next to the threshold it is held against."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gnnmd.demo.dynamics import EnergyTrace


@dataclass(frozen=True)
class Check:
    """One number of the report and what it is held against."""

    name: str
    value: str
    threshold: str
    passed: bool


@dataclass(frozen=True)
class Curves:
    """What the figure shows.

    Attributes:
        learning: ``[epochs, 2]`` epoch and validation force MAE, meV/A; None where a checkpoint was given.
        forces: reference and predicted force components of the test split, ``[2, M]`` eV/A.
        traces: constant-energy runs by label.
        g_of_r: distances ``[M]`` (Angstrom) and g(r) ``[M]`` by label.
    """

    learning: np.ndarray | None
    forces: np.ndarray
    traces: Mapping[str, EnergyTrace]
    g_of_r: Mapping[str, tuple[np.ndarray, np.ndarray]]


def draw(curves: Curves, path: Path) -> None:
    """Write the figure with four panels as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.2), dpi=130, layout="constrained")
    (a, b), (c, d) = figure.subplots(2, 2)
    if curves.learning is None:
        a.text(0.5, 0.5, "checkpoint given, nothing trained", ha="center", transform=a.transAxes)
    else:
        a.semilogy(*curves.learning.T, color="tab:blue")
    a.set(title="Training", xlabel="epoch", ylabel="validation force MAE (meV/Å)")

    reference, predicted = curves.forces
    span = [reference.min(), reference.max()]
    b.plot(span, span, color="0.7", lw=1)
    b.plot(reference, predicted, ".", ms=1.5, color="tab:blue", alpha=0.4, rasterized=True)
    b.set(title="Test forces", xlabel="EMT (eV/Å)", ylabel="model (eV/Å)", aspect="equal")

    for label, trace in curves.traces.items():
        c.plot(trace.time, trace.total, lw=0.9, label=f"{label}, rms {trace.rms:.4f}")
    c.set(title="Constant energy (NVE)", xlabel="time (ps)", ylabel="total energy (meV/atom)")
    c.legend(fontsize=8)

    for (label, (r, g)), style in zip(curves.g_of_r.items(), ("-", "--"), strict=False):
        d.plot(r, g, style, lw=1.4, label=label)
    d.set(title="Constant temperature (NVT)", xlabel="r (Å)", ylabel="g(r)")
    d.legend()
    figure.savefig(path)


def write_page(path: Path, checks: Sequence[Check], facts: Mapping[str, str], figure: str) -> None:
    """Write the HTML page that shows ``figure`` (a file name beside it), the checks and the facts."""
    rows = "\n".join(
        f"<tr><td>{html.escape(c.name)}</td><td>{html.escape(c.value)}</td><td>{html.escape(c.threshold)}</td>"
        f'<td class="{"ok" if c.passed else "no"}">{"pass" if c.passed else "FAIL"}</td></tr>'
        for c in checks
    )
    told = "\n".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    path.write_text(
        f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>gnnmd demo</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
td, th {{ border-bottom: 1px solid #ddd; padding: .3rem .9rem .3rem 0; text-align: left; }}
.ok {{ color: #0a7d33; }} .no {{ color: #b00020; font-weight: bold; }}
img {{ max-width: 100%; }}
</style>
<h1>gnnmd demo: silver</h1>
<p>An eSCN-MD potential trained on the built-in silver set (labels: ASE's EMT), then used for
molecular dynamics through the ASE calculator, next to EMT itself.</p>
<img src="{html.escape(figure)}" alt="training, parity, energy conservation and g(r)">
<h2>Checks</h2>
<table><tr><th>quantity</th><th>measured</th><th>threshold</th><th></th></tr>
{rows}
</table>
<h2>Run</h2>
<table>
{told}
</table>
</html>
""",
        encoding="utf-8",
    )
