"""The command ``gnnmd partition``: what dividing a structure over ranks costs, before any rank exists."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gnnmd.data.structures import read_structure
from gnnmd.graph import AtomBatch
from gnnmd.graph.neighbors import neighbor_list
from gnnmd.interfaces.partition_picture import draw_partition
from gnnmd.parallel.accounting import (
    INFINIBAND,
    NVLINK,
    UMA_S,
    ModelCost,
    VirtualPartition,
    efficiency,
    partition_virtually,
    strategies,
)
from gnnmd.parallel.partition import PARTITIONERS
from gnnmd.predict import load_checkpoint

_LINKS = (NVLINK, INFINIBAND)
_MOST_PAIRS = 12  # ranks whose pairs fit into a line
_PAGE = 100  # columns of the tables; narrower terminals wrap them

_LEGEND = """\
Ghosts, edges, partners, rows and MB: of the rank with most. MB are received, for energy and forces:
positions and features, and their gradients back. Wide halo: only positions travel, and the layers
of ghosts are computed too (work; not the embedding before the first layer). Efficiencies: nothing
is hidden behind work, and the host takes no time."""


def partition(argv: Sequence[str]) -> int:
    """Count what dividing a structure over ranks costs, and predict how efficient they would be."""
    parser = argparse.ArgumentParser("gnnmd partition", description=partition.__doc__)
    parser.add_argument("structure", help="file that ASE reads, or the symbol of an element for its crystal")
    parser.add_argument("--ranks", type=_numbers, default=(8,), help="numbers of ranks, e.g. 2,4,8 (8)")
    parser.add_argument("--repeat", type=_three_numbers, help="copies along the lattice vectors, e.g. 4,4,4")
    reach = parser.add_mutually_exclusive_group()
    reach.add_argument("--cutoff", type=_positive, default=6.0, help="Angstrom (%(default)s)")
    reach.add_argument("--model", help="checkpoint that gives the cutoff and the shape (UMA-S)")
    parser.add_argument(
        "--edge-time", type=_positive, help="ns per edge of a step, all layers (UMA-S on one H200: 254)"
    )
    parser.add_argument("--partition", choices=["auto", *PARTITIONERS], default="auto", help="%(default)s")
    parser.add_argument(
        "--picture", type=Path, help="PNG to write (partition.png, for one number of ranks only)"
    )
    args = parser.parse_args(argv)
    if len(args.ranks) > 1 and args.picture:
        parser.error("--picture shows one partition: give one number of --ranks")

    atoms = read_structure(args.structure, args.repeat)
    if not len(atoms):
        raise ValueError(f"{args.structure} holds no atoms")
    shape, cost, r_cut = "UMA-S", UMA_S, args.cutoff
    if args.model:
        shape, (cost, r_cut) = args.model, _cost_of(args.model)
    if args.edge_time:
        cost = replace(cost, edge_seconds=1e-9 * args.edge_time)
    batch = AtomBatch.from_ase(atoms)
    neighbors = neighbor_list(batch, r_cut)
    n_edges = neighbors.edge_index.shape[1]

    console = Console(markup=False, highlight=False)
    console.width = max(console.width, _PAGE)
    console.print(
        f"{args.structure}: {len(atoms):,} atoms, {n_edges:,} edges within {r_cut:g} A\n"
        f"{shape}: layers {cost.n_layers}, exchanges {cost.n_exchanges}, each {cost.row_bytes:,} bytes per "
        f"ghost\none rank: {1e3 * n_edges * cost.edge_seconds:,.1f} ms per step, "
        f"{1e9 * cost.edge_seconds:.0f} ns per edge{'' if args.edge_time else ' (as UMA-S on one H200)'}"
    )
    divided = [partition_virtually(batch, neighbors, n, args.partition) for n in args.ranks]
    console.print("", _shares(divided), "", _costs(divided, cost), "", _LEGEND, sep="\n")
    if len(divided) == 1:
        if 1 < divided[0].n_parts <= _MOST_PAIRS:
            console.print("", _pairs(divided[0]), "", sep="\n")
        path = args.picture or Path("partition.png")
        draw_partition(path, batch, divided[0], r_cut)
        console.print(f"picture: {path}")
    return 0


def _cost_of(checkpoint: str) -> tuple[ModelCost, float]:
    """Return what a checkpoint's model costs, with UMA-S's time per edge, and its cutoff (Angstrom)."""
    backbone = load_checkpoint(checkpoint)[0].backbone
    exchanges, row_bytes = len(backbone.blocks) - 1, backbone.row_width * 4  # float32
    return ModelCost(exchanges, exchanges, row_bytes, UMA_S.edge_seconds), backbone.r_cut


def _shares(divided: Sequence[VirtualPartition]) -> Table:
    table = _table(
        "ranks", "cut by", "owned, min", "mean", "max", "ghosts", "edges", "edges/mean", "partners"
    )
    for p in divided:
        owned, rows = p.owned, p.all_to_all()
        empty = int((owned == 0).sum())
        table.add_row(
            f"{p.n_parts}{f' ({empty} empty)' if empty else ''}",
            {"axes": "planes", "morton": "Morton", "index": "index"}[p.cuts.keys],
            f"{int(owned.min()):,}",
            f"{len(p.owner) / p.n_parts:,.1f}",
            f"{int(owned.max()):,}",
            f"{int(rows.received.max()):,}",
            f"{int(p.edges.max()):,}",
            f"{p.imbalance:.3f}",
            f"{int(rows.partners.max())}",
        )
    return table


def _costs(divided: Sequence[VirtualPartition], model: ModelCost) -> Table:
    columns = ("ranks", "strategy", "rows", "MB/layer", "and back", "MB/step", "all ranks", "work")
    table = _table(*columns, *(link.name for link in _LINKS))
    for p in (p for p in divided if p.n_parts > 1):
        for strategy in strategies(p, model):
            features = [leg for leg in strategy.legs if leg.what.endswith("features 1")]
            forward, backward = (f"{leg.received.max() / 1e6:,.2f}" for leg in features) if features else "--"
            table.add_row(
                f"{p.n_parts}",
                strategy.name,
                f"{strategy.legs[0].rows.received.max():,}",
                forward,
                backward,
                f"{strategy.received.max() / 1e6:,.2f}",
                f"{strategy.received.sum() / 1e6:,.0f}",
                f"{float(strategy.edges.sum()) / (int(p.edges.sum()) or 1):.2f}",
                *(f"{100 * efficiency(p, strategy, link, model):.1f} %" for link in _LINKS),
            )
    return table


def _pairs(divided: VirtualPartition) -> Table:
    table = _table("rows from", *(f"to {rank}" for rank in range(divided.n_parts)))
    for rank, rows in enumerate(divided.all_to_all().table().tolist()):
        table.add_row(str(rank), *(f"{n:,}" if n else "." for n in rows))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in columns:
        left = column in ("cut by", "strategy")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    return table


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.strip("[]").split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers of at least 1, e.g. 8 or 2,4,8")
    return numbers


def _three_numbers(text: str) -> tuple[int, ...]:
    numbers = _numbers(text)
    if len(numbers) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} must be three numbers, e.g. 4,4,4")
    return numbers


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive number")
    return number
