"""The potential that a training run starts from: fresh, or that of a checkpoint."""

from dataclasses import asdict

import torch
from rich.console import Console

from gnnmd.data.datamodule import AtomsDataModule
from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.escn_md import EscnMDConfig
from gnnmd.models.potential import Potential
from gnnmd.parallel import Mesh
from gnnmd.predict.checkpoint import CheckpointInfo
from gnnmd.training.finetune import refit_references, start_from
from gnnmd.training.module import labelled_graph
from gnnmd.training.settings import TrainConfig

#: Frames that settle what a fresh network says of each element.
FRESH_FRAMES = 10


def fresh_potential(config: TrainConfig, data: AtomsDataModule, mesh: Mesh) -> Potential:
    """Build the potential of the configuration; its references, scale and statistics are the data's."""
    known = data.statistics
    potential = build_potential(
        PotentialConfig(config.model, config.heads, datasets=_datasets(data), elements=known.elements)
    )
    potential.element_energies.copy_(torch.tensor(known.element_energies))
    scales = [x for x in (known.force_rms, known.energy_std) if x > 0]  # NaN where there is no label
    potential.energy_scale.fill_(scales[0] if scales else 1.0)
    if potential.backbone.needs_statistics:
        _set_statistics(potential.to(mesh.gp.device), data, mesh)
    if not isinstance(config.model, EscnMDConfig):
        # A fresh fitting net says some energy per element: left there, it would rule the first steps.
        refit_references(potential.to(mesh.gp.device), data.train_set, mesh.gp, FRESH_FRAMES)
    return potential


def _set_statistics(potential: Potential, data: AtomsDataModule, mesh: Mesh) -> None:
    """Let the backbone normalise what it sees by the training data; collective."""
    backbone, loader = potential.backbone, data.train_dataloader()
    sums: list[torch.Tensor] = []
    for i, frames in enumerate(loader):
        batch = labelled_graph(potential, frames, mesh.gp).to(mesh.gp.device)
        g = batch.graph.with_positions(batch.gp.exchange(batch.labels.positions), batch.graph.cell)
        sums.append((not loader.repeats(i)) * backbone.statistics(g, batch.gp.n_owned))
    # Replicas of one rank count on the CPU, but their sums travel where the ranks are.
    backbone.set_statistics(mesh.world.sum(torch.stack(sums).sum(0).to(mesh.world.device)))


def continued_potential(
    config: TrainConfig,
    data: AtomsDataModule,
    source: tuple[Potential, CheckpointInfo],
    console: Console,
    mesh: Mesh,
) -> Potential:
    """Build the potential from a checkpoint and fit its references to the training data."""
    potential, report = start_from(
        *source,
        heads=config.heads,
        datasets=_datasets(data),
        elements=data.statistics.elements,
        settings=config.finetune,
        prepare=lambda fresh: _set_statistics(fresh.to(mesh.gp.device), data, mesh),
    )
    refit_references(potential.to(mesh.gp.device, dtype_of(config)), data.train_set, mesh.gp)
    console.print(report)
    mine, theirs = asdict(config.model), asdict(potential.config.model)
    if theirs["type"] != mine["type"]:
        changed = [f"type={theirs['type']}"]
    else:
        changed = [f"{key}={theirs[key]}" for key in theirs if theirs[key] != mine[key]]
    if changed:
        console.print(f"  the checkpoint's architecture is kept: {', '.join(changed)}")
    return potential


def _datasets(data: AtomsDataModule) -> tuple[str, ...]:
    return tuple(sorted({str(name) for name in data.train_set.labels("dataset")} - {""}))


def dtype_of(config: TrainConfig) -> torch.dtype:
    """Return the type of the weights."""
    return torch.float64 if config.trainer.precision == "float64" else torch.float32
