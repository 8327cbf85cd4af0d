"""A picture of metrics.csv."""

import csv
from pathlib import Path

from gnnmd.predict.metrics import SHOWN_UNITS
from gnnmd.units import MEV


def save_learning_curve(metrics: Path, path: Path) -> None:
    """Draw the errors of every quantity over the epochs and write a PNG, unless there are none."""
    from matplotlib.figure import Figure  # the object interface: no global state, no display

    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name in SHOWN_UNITS:
        for split in ("train", "val"):
            key = f"{split}_{name}_mae"
            if points := [(int(row["epoch"]), MEV * float(row[key])) for row in rows if row[key]]:
                curves.setdefault(name, {})[split] = points
    if not curves:
        return
    figure = Figure(figsize=(4.6 * len(curves), 3.6), dpi=130, layout="constrained")
    for axes, (name, splits) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True
    ):
        for split, points in splits.items():
            axes.semilogy(*zip(*points, strict=True), label=split)
        axes.set(title=name, xlabel="epoch", ylabel=f"MAE ({SHOWN_UNITS[name]})")
        axes.legend()
    figure.savefig(path)
