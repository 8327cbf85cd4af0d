"""Starting from the weights of another training: other data, other elements, other heads."""

from dataclasses import replace
from pathlib import Path

import torch
from ase.data import chemical_symbols

from gnnmd.data.dataset import AtomsDataset
from gnnmd.data.statistics import element_references
from gnnmd.models.build import build_potential, from_dict
from gnnmd.models.escn_md import EscnMDConfig
from gnnmd.models.potential import Potential
from gnnmd.parallel import Ranks
from gnnmd.predict.checkpoint import CheckpointInfo
from gnnmd.training.callbacks import BEST
from gnnmd.training.module import labelled_graph, predict

#: Frames whose energies settle the references; more change them by less than the model's error.
REFERENCE_FRAMES = 200


def find_source(init_from: str) -> str | Path:
    """Return the checkpoint meant by ``init_from``: a run folder stands for its best model."""
    return Path(init_from) / BEST if Path(init_from).is_dir() else init_from


def start_from(
    old: Potential, info: CheckpointInfo, *, heads: str, datasets: tuple[str, ...], elements: tuple[int, ...]
) -> tuple[Potential, str]:
    """Build a potential with the weights of another one.

    The energy scale stays that of the old weights: forces would start wrong by the ratio of the scales
    otherwise.

    Args:
        old: the potential to start from.
        info: what its checkpoint says.
        heads: "conservative" or "direct".
        datasets: names of the data sets in the new data.
        elements: atomic numbers in the new data.

    Raises:
        ValueError: a new data set where every data set has a head of its own.

    Returns:
        The potential, and what was loaded, what is fresh and what was left behind, to be told to the user.
    """
    known = from_dict(info.config)
    # a model without data set names reads any; one with names keeps them beside the new ones
    added = tuple(name for name in datasets if name not in known.datasets) if known.datasets else ()
    if added and known.dataset_heads == "experts":
        raise ValueError(
            f"the data set {added[0]!r} has no head in the checkpoint, which has one for each of "
            f"{', '.join(known.datasets)}. Set data.dataset to one of these"
        )
    new_elements = tuple(z for z in elements if known.elements and z not in known.elements)
    model = known.model
    if not isinstance(model, EscnMDConfig):  # its tables have a row per element it knows
        symbols = [chemical_symbols[z] for z in elements]
        model = replace(model, type_map=(*model.type_map, *(s for s in symbols if s not in model.type_map)))
    config = replace(
        known,
        model=model,
        heads=heads,
        stress_head=known.stress_head if heads == known.heads else None,
        datasets=known.datasets + added,
        elements=tuple(sorted(known.elements + new_elements)),
    )
    potential = build_potential(config)
    mine, theirs = potential.state_dict(), old.state_dict()
    shared = {name: w for name, w in theirs.items() if name in mine and mine[name].shape == w.shape}
    for name, w in theirs.items():  # tables of data sets and elements, when some were added at the end
        if name in mine and name not in shared and w.ndim == mine[name].ndim:
            grown = mine[name].clone()
            grown[tuple(slice(n) for n in w.shape)] = w
            shared[name] = grown
    potential.load_state_dict(shared, strict=False)
    lines = [f"starting weights: {len(shared)} of {len(mine)} tensors from run {info.extra.get('name')!r}"]
    for title, names in (
        ("fresh", mine.keys() - shared.keys()),
        ("left behind", theirs.keys() - shared.keys()),
    ):
        if names:
            lines.append(f"  {title}: {', '.join(sorted({'.'.join(n.split('.')[:2]) for n in names}))}")
    if new_elements:
        lines.append(f"  elements it has not seen: {', '.join(chemical_symbols[z] for z in new_elements)}")
    return potential, "\n".join(lines)


def refit_references(
    potential: Potential,
    dataset: AtomsDataset,
    ranks: Ranks | None = None,
    most_frames: int = REFERENCE_FRAMES,
) -> None:
    """Shift the reference energy of every element to fit the energies of ``dataset`` best.

    Fitted to what the network leaves over, not to the raw energies: the references of a second fit to raw
    energies would add the cohesive energy, which the network already predicts, a second time.

    Args:
        potential: on the device of the ranks.
        dataset: energies to fit.
        ranks: they evaluate every frame together; None is this process alone.
        most_frames: how many frames, spread over the data set, are evaluated at most.
    """
    frames = torch.linspace(0, len(dataset) - 1, min(len(dataset), most_frames)).long()
    rests, compositions = [], []
    training = potential.training
    potential.eval()
    for i in frames.tolist():
        batch = labelled_graph(potential, dataset[i], ranks)
        if batch.labels.energy.isfinite().all():
            rest = batch.labels.energy - predict(potential, batch, stress=False).energy
            rests.append(rest.cpu())
            compositions.append(torch.bincount(dataset[i].z, minlength=119)[None])
    potential.train(training)
    if rests:
        change, _ = element_references(torch.cat(rests), torch.cat(compositions))
        potential.element_energies += change.to(potential.element_energies.device)
