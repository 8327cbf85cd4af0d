"""A picture of a partition: slices through the atoms, coloured by owner, and what each rank holds."""

from pathlib import Path

import numpy as np

from gnnmd.graph import AtomBatch
from gnnmd.parallel.accounting import VirtualPartition, copies
from gnnmd.parallel.ranks import Ranks
from gnnmd.parallel.sites import find_box

_GOLDEN_RATIO = 0.618034  # hues that differ between neighbouring numbers, however many there are


def draw_partition(path: Path, batch: AtomBatch, divided: VirtualPartition, r_cut: float) -> None:
    """Write a PNG: three slices through the rank with the most ghosts, and bars of all ranks.

    Args:
        path: file to write.
        batch: one system.
        divided: its partition.
        r_cut: cutoff, Angstrom.
    """
    from matplotlib.collections import EllipseCollection
    from matplotlib.colors import hsv_to_rgb
    from matplotlib.figure import Figure  # the object interface: no global state, no display

    n_parts, owner = divided.n_parts, divided.owner.numpy()
    atom, needer = copies(divided.edge_index, divided.owner, n_parts)
    owned, ghosts = divided.owned.numpy(), np.bincount(needer, minlength=n_parts)
    worst = int(np.lexsort((owned, ghosts))[-1])
    read = np.zeros(len(owner), dtype=bool)
    read[atom[needer == worst]] = True

    box = find_box(batch.positions, batch.system, batch.cell, batch.pbc, Ranks())
    edge, height = box.edge[0].numpy(), box.height[0].numpy()
    x = box.coordinates(batch.positions, batch.system).numpy() * edge  # lattice vectors drawn upright
    spacing = (height.clip(1.0).prod() / len(x)) ** (1 / 3)
    middle = np.median(x[owner == worst], axis=0)

    colour = hsv_to_rgb(
        [((rank * _GOLDEN_RATIO) % 1, 0.55, (0.95, 0.75)[rank % 2]) for rank in range(n_parts)]
    )
    figure = Figure(figsize=(12, 7.4), dpi=130, layout="constrained")
    slices, bars = figure.subplots(2, 3, height_ratios=(2.2, 1))
    for axes, across in zip(slices, (2, 1, 0), strict=True):
        right, up = (axis for axis in range(3) if axis != across)
        inside = np.abs(x[:, across] - middle[across]) < spacing / 2
        for shown, alpha, ring in (
            (inside & ~read & (owner != worst), 0.35, "none"),
            (inside & read, 1.0, "0.15"),
            (inside & (owner == worst), 1.0, "none"),
        ):
            size = np.full(shown.sum(), 0.95 * spacing)
            discs = EllipseCollection(
                size,
                size,
                np.zeros_like(size),
                units="xy",
                offsets=x[shown][:, [right, up]],
                offset_transform=axes.transData,
                facecolors=colour[owner[shown]],
                edgecolors=ring,
                linewidths=0.7,
                alpha=alpha,
            )
            axes.add_collection(discs)
        limits = [(-spacing, edge[axis] + spacing) for axis in (right, up)]
        axes.set(xlim=limits[0], ylim=limits[1], aspect="equal")
        axes.set(xlabel=f"along {'abc'[right]} (Å)", ylabel=f"along {'abc'[up]} (Å)")
        axes.set_title(f"slice at {'abc'[across]} = {middle[across]:.1f} Å", fontsize=10)
    for axes, (name, values) in zip(
        bars,
        {"owned atoms": owned, "ghosts": ghosts, "edges": divided.edges.numpy()}.items(),
        strict=True,
    ):
        few = n_parts <= 64
        axes.bar(np.arange(n_parts), values, width=0.8 if few else 1.0, color=colour if few else "0.6")
        axes.axhline(values.mean(), color="0.3", lw=1, ls="--")
        axes.set_title(f"{name}: mean {values.mean():,.0f}, largest {values.max():,}", fontsize=10)
        axes.set(xlabel="rank", xlim=(-0.6, n_parts - 0.4))
    figure.suptitle(
        f"{len(owner):,} atoms on {n_parts} ranks, cutoff {r_cut:g} Å. "
        f"Full colours: rank {worst} and, ringed, its {ghosts[worst]:,} ghosts"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
