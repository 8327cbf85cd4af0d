"""Errors of the potential that a run exports, with pictures."""

import json
from pathlib import Path

import torch
from rich.console import Console

from gnnmd.data.datamodule import AtomsDataModule, AtomsLoader
from gnnmd.models.potential import Potential
from gnnmd.parallel import Mesh
from gnnmd.predict.checkpoint import load_checkpoint, save_checkpoint
from gnnmd.predict.metrics import ErrorMeter, error_table
from gnnmd.predict.parity_plot import Parity, save_parity_plot
from gnnmd.training.folder import ERRORS, METRICS
from gnnmd.training.learning_curve import save_learning_curve
from gnnmd.training.module import PotentialModule, labelled_graph, predict
from gnnmd.training.strategy import copy_from_first


def evaluate(
    potential: Potential, loader: AtomsLoader, device: torch.device, mesh: Mesh | None = None
) -> tuple[dict[str, float], Parity]:
    """Return errors of a potential on the frames of a loader, and the pairs for a parity plot; collective.

    Args:
        potential: the same on all ranks.
        loader: the frames of this replica.
        device: where to compute.
        mesh: all processes; None is this one alone. The pairs are the first one's.
    """
    mesh = mesh or Mesh()
    potential = potential.to(device).eval()
    meter, parity = ErrorMeter(per_element=True, sources=loader.dataset.sources), Parity()
    for i, data in enumerate(loader):
        if loader.repeats(i):
            continue
        batch = labelled_graph(potential, data, mesh.gp).to(device)
        prediction = predict(potential, batch)
        meter.update(prediction, batch.labels, batch.graph.n_atoms, batch.source)
        parity.update(prediction, batch.labels, batch.graph.n_atoms)
    return meter.total(mesh).errors(), parity.total(mesh)


def report(
    checkpoint: Path,
    split: str,
    data: AtomsDataModule,
    module: PotentialModule,
    mesh: Mesh,
    console: Console,
) -> dict[str, float]:
    """Evaluate the exported model as a user would load it; write errors and pictures."""
    first = mesh.world.rank == 0
    potential = module.average
    if first:
        potential, info = load_checkpoint(checkpoint)
        potential.backbone.edge_chunk = module.average.backbone.edge_chunk
    device = module.device if mesh.world.group is None else mesh.world.device
    copy_from_first(potential.to(device), mesh.world)
    loader = data.test_dataloader() if split == "test" else data.val_dataloader()
    errors, parity = evaluate(potential, loader, device, mesh)
    if not first:
        return errors
    extra = {**info.extra, f"{split}_errors": errors}
    save_checkpoint(checkpoint, potential.cpu(), info.config, info.statistics, extra)
    folder = checkpoint.parent
    (folder / ERRORS).write_text(json.dumps({"split": split, **errors}, indent=2))
    if pairs := parity.pairs():
        save_parity_plot(folder / "parity.png", pairs, f"{split} set")
    save_learning_curve(folder / METRICS, folder / "learning_curve.png")
    frames = len(loader.dataset)
    console.print(f"\nerrors on the {split} set ({frames} frames) of {checkpoint}")
    console.print(error_table(errors))
    console.print(f"pictures: {folder / 'parity.png'}, {folder / 'learning_curve.png'}")
    console.print(
        f"use it: gnnmd md model={checkpoint} ... or PredictUnit.from_checkpoint({str(checkpoint)!r})",
    )
    return errors
