"""The commands ``gnnmd info``, ``gnnmd convert``, ``gnnmd predict`` and ``gnnmd evaluate``."""

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ase.io
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import chemical_symbols
from ase.stress import full_3x3_to_voigt_6_stress
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from gnnmd.data.readers import read_frames, read_sources
from gnnmd.data.silver import load_silver
from gnnmd.graph import AtomBatch, LabelKeys
from gnnmd.models.potential import Prediction
from gnnmd.predict.checkpoint import CheckpointInfo, read_info, save_checkpoint
from gnnmd.predict.metrics import SHOWN_UNITS, ErrorMeter, error_table
from gnnmd.predict.parity_plot import Parity, save_parity_plot
from gnnmd.predict.settings import InferenceSettings
from gnnmd.predict.unit import PredictUnit
from gnnmd.predict.upstream import load_upstream
from gnnmd.predict.workers import check_alone
from gnnmd.units import MEV

_LONGEST_SHOWN = 8  # values of a list that `info` prints in full


def info(argv: Sequence[str]) -> int:
    """Print what a checkpoint says about itself."""
    parser = argparse.ArgumentParser("gnnmd info", description=info.__doc__)
    parser.add_argument("checkpoint", help='a .safetensors file, or the name of a shipped one ("silver")')
    args = parser.parse_args(argv)
    found = read_info(args.checkpoint)
    console = _console()
    console.print(_table(args.checkpoint, _summary(found)))
    for title in ("config", "statistics", "extra"):
        if content := getattr(found, title):
            console.print(_table(title, dict(_flat(content))))
    return 0


def convert(argv: Sequence[str]) -> int:
    """Turn a checkpoint of fairchem-core (UMA, eSEN) or deepmd-kit (DPA-2, DPA-3) into one of gnnmd."""
    parser = argparse.ArgumentParser("gnnmd convert", description=convert.__doc__)
    parser.add_argument("upstream", type=Path, help="inference checkpoint of fairchem-core, or model.ckpt.pt")
    parser.add_argument("output", type=Path, help=".safetensors file to write")
    parser.add_argument("--task", help="data set of a fairchem model, for instance omat")
    parser.add_argument("--head", help="head of a deepmd-kit model of multi-task training")
    args = parser.parse_args(argv)
    if args.output.suffix != ".safetensors":
        parser.error(f"checkpoints end in .safetensors, not {args.output.suffix!r}")
    potential, origin = load_upstream(args.upstream, task=args.task, head=args.head)
    save_checkpoint(args.output, potential, extra=origin)
    _console().print(f"{args.upstream} -> {args.output} (gnnmd info {args.output})")
    return 0


def predict(argv: Sequence[str]) -> int:
    """Write the energy, forces, stress and energies per atom of every frame of a file."""
    parser = argparse.ArgumentParser("gnnmd predict", description=predict.__doc__)
    _add_common(parser)
    parser.add_argument("-o", "--output", required=True, type=Path, help="extxyz file to write")
    args = parser.parse_args(argv)
    if args.output.suffix not in (".extxyz", ".xyz"):
        parser.error(f"--output is written as extxyz: end its name in .extxyz, not {args.output.suffix!r}")
    with _unit(args) as unit:
        frames = _frames(args)
        _attach(frames, _predict(unit, frames))
    ase.io.write(args.output, frames, format="extxyz")
    _console().print(f"{len(frames)} frames -> {args.output}")
    return 0


def evaluate(argv: Sequence[str]) -> int:
    """Compare predictions with the labels of files: a table of errors and a parity plot."""
    parser = argparse.ArgumentParser("gnnmd evaluate", description=evaluate.__doc__)
    _add_common(parser, nargs="+")
    parser.add_argument("--plot", type=Path, default=Path("parity.png"), help="PNG to write (%(default)s)")
    defaults = LabelKeys()
    for name in ("energy", "forces", "stress", "virial"):
        parser.add_argument(
            f"--{name}-key", default=getattr(defaults, name), help=f"label of the {name} (%(default)s)"
        )
    args = parser.parse_args(argv)
    with _unit(args) as unit:
        keys = LabelKeys(args.energy_key, args.forces_key, args.stress_key, args.virial_key)
        frames, sources = _labelled_frames(args, keys)
        prediction, labels = _predict(unit, frames), AtomBatch.from_ase(frames)
    names = list(dict.fromkeys(sources))
    meter, parity = ErrorMeter(per_element=True, sources=names), Parity()
    meter.update(prediction, labels, source=torch.tensor([names.index(source) for source in sources]))
    parity.update(prediction, labels)
    given = ", ".join(args.input)
    console = _console()
    console.print(f"{args.checkpoint} on {given}: {len(frames)} frames, {len(labels.numbers)} atoms")
    console.print(error_table(meter.errors()))
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"parity plot: {save_parity_plot(args.plot, parity.pairs(), given)}")
    return 0


def _console() -> Console:
    return Console(markup=False, highlight=False)  # file names may hold brackets


def _add_common(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument("checkpoint", help='a .safetensors file, or the name of a shipped one ("silver")')
    parser.add_argument(
        "input",
        nargs=nargs,
        help='whatever ASE reads, a DeePMD system, or "silver" for the built-in test set',
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--workers", type=int, help="spread every frame over so many GPUs (or processes)")
    parser.add_argument("--dtype", default="float32", help="float32 or float64 (%(default)s)")
    parser.add_argument("--tf32", action="store_true", help="TF32 matrix products on GPUs")
    parser.add_argument("--max-edges", type=int, help="most edges and atoms per call (default: what fits)")
    parser.add_argument("--dataset", default="", help="level of theory, for models that know several")


def _unit(args: argparse.Namespace) -> PredictUnit:
    settings = InferenceSettings(dtype=args.dtype, tf32=args.tf32, max_edges=args.max_edges)
    check_alone(args.workers)
    return PredictUnit.from_checkpoint(
        args.checkpoint, device=args.device, settings=settings, workers=args.workers
    )


def _frames(args: argparse.Namespace) -> list[Atoms]:
    return load_silver("test") if _is_silver(args.input) else read_frames(args.input, dataset=args.dataset)


def _labelled_frames(args: argparse.Namespace, keys: LabelKeys) -> tuple[list[Atoms], list[str]]:
    """Read all inputs; return the frames and the data set that each is of."""
    if args.input == ["silver"] and _is_silver("silver"):
        frames = load_silver("test")
        return frames, ["silver"] * len(frames)
    return read_sources(args.input, keys=keys, dataset=args.dataset, labelled=True)


def _is_silver(name: str) -> bool:
    return name == "silver" and not Path(name).exists()


def _predict(unit: PredictUnit, frames: list[Atoms]) -> Prediction:
    columns = [*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("frames", total=len(frames))
        return unit.predict(frames, progress=lambda done: bar.advance(task, done))


def _attach(frames: Sequence[Atoms], prediction: Prediction) -> None:
    """Put a prediction in the place of the labels of each frame."""
    sizes = [len(frame) for frame in frames]
    forces, energies = prediction.forces.split(sizes), prediction.node_energies.split(sizes)
    for b, frame in enumerate(frames):
        results = {
            "energy": prediction.energy[b].item(),
            "forces": forces[b].numpy(),
            "energies": energies[b].numpy(),
        }
        if prediction.stress is not None and prediction.stress[b].isfinite().all():
            results["stress"] = full_3x3_to_voigt_6_stress(prediction.stress[b].numpy())
        frame.calc = SinglePointCalculator(frame, **results)


def _table(title: str, content: Mapping[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for key, value in content.items():
        table.add_row(key, _shown(key, value))
    return table


def _summary(found: CheckpointInfo) -> dict[str, str]:
    elements = [chemical_symbols[z] for z in found.elements]
    return {
        "parameters": f"{found.n_parameters:,} ({found.dtype})",
        "cutoff": f"{found.r_cut:g} A",
        "elements": " ".join(elements) or "all",
        "data sets": ", ".join(found.datasets) or "one",
        "written by": f"gnnmd {found.gnnmd}, torch {found.torch}, format {found.format}",
    }


def _shown(key: str, value: Any) -> str:
    """Return a value for a person: errors in meV, tables by element, long lists by their length."""
    error = re.match(r"(?:.*\.)?(energy|forces|stress)_(?:mae|rmse)", key)
    if error and value is not None:
        return f"{value * MEV:.3f} {SHOWN_UNITS[error[1]]}"
    if isinstance(value, list) and len(value) == len(chemical_symbols):
        return "  ".join(f"{symbol} {v:.6g}" for symbol, v in zip(chemical_symbols, value, strict=True) if v)
    if isinstance(value, list) and len(value) > _LONGEST_SHOWN:
        return f"{len(value)} values"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dictionaries with dotted names."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
