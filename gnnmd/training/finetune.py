"""Starting from the weights of another training: other data, other elements, other heads."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from ase.data import chemical_symbols

from gnnmd.data.dataset import AtomsDataset
from gnnmd.data.statistics import element_references
from gnnmd.models.build import ModelConfig, build_potential, from_dict
from gnnmd.models.escn_md import EscnMDConfig
from gnnmd.models.potential import Potential
from gnnmd.nn.environment import Environment
from gnnmd.nn.type_embedding import TypeEmbedding
from gnnmd.parallel import Ranks
from gnnmd.predict.checkpoint import CheckpointInfo
from gnnmd.training.callbacks import BEST
from gnnmd.training.module import labelled_graph, predict
from gnnmd.training.settings import FinetuneConfig

#: Frames whose energies settle the references; more change them by less than the model's error.
REFERENCE_FRAMES = 200


def find_source(init_from: str) -> str | Path:
    """Return the checkpoint meant by ``init_from``: a run folder stands for its best model."""
    return Path(init_from) / BEST if Path(init_from).is_dir() else init_from


def start_from(
    old: Potential,
    info: CheckpointInfo,
    *,
    heads: str,
    datasets: tuple[str, ...],
    elements: tuple[int, ...],
    settings: FinetuneConfig | None = None,
    prepare: Callable[[Potential], None] | None = None,
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
        settings: what is kept.
        prepare: called with the fresh potential before the old weights go into it, if it normalises by
            statistics of the data and has elements that the old one has not.

    Raises:
        ValueError: a new data set where every data set has a head of its own, or something new in a backbone
            that is to be frozen.

    Returns:
        The potential, and what was loaded, what is fresh and what was left behind, to be told to the user.
    """
    settings, known = settings or FinetuneConfig(), from_dict(info.config)
    # a model without data set names reads any; one with names keeps them beside the new ones
    added = tuple(name for name in datasets if name not in known.datasets) if known.datasets else ()
    if added and known.dataset_heads == "experts":
        raise ValueError(
            f"the data set {added[0]!r} has no head in the checkpoint, which has one for each of "
            f"{', '.join(known.datasets)}. Set data.dataset to one of these"
        )
    new_elements = tuple(z for z in elements if known.elements and z not in known.elements)
    result = tuple(sorted(elements))  # () = all that its tables hold
    if settings.elements == "all":
        result = tuple(sorted(known.elements + new_elements))
    config = replace(
        known,
        model=_with_elements(known.model, result),
        heads=heads,
        stress_head=known.stress_head if heads == known.heads else None,
        datasets=known.datasets + added,
        elements=result,
    )
    potential = build_potential(config).to(next(old.parameters()).dtype)
    if prepare is not None and new_elements and potential.backbone.needs_statistics:
        prepare(potential)
        potential.cpu()
    mine, theirs = potential.state_dict(), old.state_dict()
    by_element = _copy_types(potential, old)
    shared = {
        name: w
        for name, w in theirs.items()
        if name in mine and mine[name].shape == w.shape and name not in by_element
    }
    grown = {}
    for name, w in theirs.items():  # tables of data sets, when some were added at the end
        if name in mine and name not in {*shared, *by_element} and w.ndim == mine[name].ndim:
            grown[name] = mine[name].clone()
            grown[name][tuple(slice(n) for n in w.shape)] = w
    potential.load_state_dict(shared | grown, strict=False)
    if result:
        strangers = torch.ones(len(potential.element_energies), dtype=torch.bool)
        strangers[list(result)] = False
        potential.element_energies[strangers] = 0.0
    loaded = {*shared, *grown, *by_element}
    if settings.freeze_backbone:
        novel = [f"elements {_symbols(new_elements)}"] if new_elements else []
        novel += [n for n in mine if n.startswith("backbone.") and (n in grown or n not in loaded)]
        if novel:
            raise ValueError(
                f"finetune.freeze_backbone=true, but the backbone has to learn {', '.join(novel)}. Train it "
                "too (finetune.freeze_backbone=false), or leave these data out"
            )
        potential.backbone.requires_grad_(False)
    lines = [f"starting weights: {len(loaded)} of {len(mine)} tensors from run {info.extra.get('name')!r}"]
    for title, names in (
        ("fresh", mine.keys() - loaded),
        ("left behind", theirs.keys() - loaded),
    ):
        if names:
            lines.append(f"  {title}: {', '.join(sorted({'.'.join(n.split('.')[:2]) for n in names}))}")
    if new_elements:
        lines.append(f"  elements it has not seen: {_symbols(new_elements)}")
    unseen = set(known.elements or range(1, old.backbone.max_number + 1)) - set(elements)
    if unseen and settings.elements == "data":
        lines.append(
            f"  for {_symbols(elements)} only: the data has none of the {len(unseen)} other elements that "
            "the old model knows (finetune.elements=all keeps them, with their old references)"
        )
    elif unseen:
        lines.append(f"  {len(unseen)} elements are not in the data: their references are the old ones")
    if settings.freeze_backbone:
        n = sum(p.numel() for p in potential.parameters() if p.requires_grad)
        lines.append(f"  the backbone is frozen: {n:,} weights are trained")
    return potential, "\n".join(lines)


def _with_elements(model: ModelConfig, elements: tuple[int, ...]) -> ModelConfig:
    """Return the shape for these elements; the tables of eSCN-MD are by atomic number and stay whole."""
    if isinstance(model, EscnMDConfig):
        return model
    symbols = [chemical_symbols[z] for z in elements]
    kept = [s for s in model.type_map if s in symbols]  # in their old order
    type_map = (*kept, *(s for s in symbols if s not in kept))
    pairs = tuple(pair for pair in model.exclude_types if set(pair) <= set(type_map))
    return replace(model, type_map=type_map, exclude_types=pairs)


def _copy_types(potential: Potential, old: Potential) -> set[str]:
    """Copy what the DPA models hold per type, element by element, and return the names of these tensors."""
    shape, old_shape = potential.config.model, old.config.model
    if isinstance(shape, EscnMDConfig):
        return set()
    both = [symbol for symbol in shape.type_map if symbol in old_shape.type_map]
    types = [shape.type_map.index(s) for s in both], [old_shape.type_map.index(s) for s in both]
    copied: set[str] = set()
    for name, module in potential.backbone.named_modules():
        if isinstance(module, TypeEmbedding):
            module.copy_elements(old.backbone.get_submodule(name), *types)  # type: ignore[arg-type]
        elif isinstance(module, Environment):
            module.copy_types(old.backbone.get_submodule(name), *types)  # type: ignore[arg-type]
        else:
            continue
        copied |= {f"backbone.{name}.{key}" for key in module.state_dict()}
    return copied


def _symbols(elements: Iterable[int]) -> str:
    return ", ".join(chemical_symbols[z] for z in sorted(elements))


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
