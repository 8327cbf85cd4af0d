"""From a plain configuration to a potential and back."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from torch import nn

from gnnmd.models.escn_md import EscnMD, EscnMDConfig, ExpertsConfig
from gnnmd.models.heads import EnergyHead, ForceHead, StressHead
from gnnmd.models.potential import MergedFor, Potential

T = TypeVar("T")


@dataclass
class PotentialConfig:
    """Everything that is needed to rebuild a potential before its weights are loaded.

    Attributes:
        model: the backbone.
        heads: "conservative" (forces and stress are derivatives of the energy) or "direct" (heads of their
            own).
        energy_head: "mlp" or "linear".
        stress_head: whether the stress has a head of its own; None = if heads are direct and lmax >= 2.
        stress_reduce: "mean" or "sum" of what the stress head says of the atoms.
        datasets: names of the data sets (levels of theory) the model tells apart; () = one without a name.
        dataset_mapping: for some of them, the one whose embedding and expert they use instead of their own.
        dataset_heads: "shared", or "experts": each data set has an energy head of its own.
        elements: atomic numbers it may be used for; () = all its tables hold.
        merged_for: the systems its experts were merged for.
    """

    model: EscnMDConfig = field(default_factory=EscnMDConfig)
    heads: str = "conservative"
    energy_head: str = "mlp"
    stress_head: bool | None = None
    stress_reduce: str = "mean"
    datasets: tuple[str, ...] = ()
    dataset_mapping: dict[str, str] = field(default_factory=dict)
    dataset_heads: str = "shared"
    elements: tuple[int, ...] = ()
    merged_for: MergedFor | None = None

    def __post_init__(self) -> None:
        self.datasets, self.elements = tuple(self.datasets), tuple(self.elements)
        for name, value, known in [
            ("heads", self.heads, ("conservative", "direct")),
            ("energy_head", self.energy_head, ("mlp", "linear")),
            ("stress_reduce", self.stress_reduce, ("mean", "sum")),
            ("dataset_heads", self.dataset_heads, ("shared", "experts")),
        ]:
            if value not in known:
                raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(known)}")
        if len(set(self.datasets)) != len(self.datasets):
            raise ValueError(f"datasets={self.datasets} must differ from each other")
        strangers = {*self.dataset_mapping, *self.dataset_mapping.values()} - set(self.datasets)
        if strangers:
            raise ValueError(
                f"dataset_mapping names {sorted(strangers)}, which are not in datasets={self.datasets}"
            )
        if self.dataset_heads == "experts" and not self.datasets:
            raise ValueError("dataset_heads='experts' needs the names of the data sets in datasets")
        lmax = self.model.lmax
        if self.stress_head is None:
            self.stress_head = self.heads == "direct" and lmax >= 2
        if (self.heads == "direct" and lmax < 1) or (self.stress_head and lmax < 2):
            raise ValueError(
                f"direct forces need lmax >= 1 and a stress head needs lmax >= 2; lmax is {lmax}"
            )

    def dataset_representatives(self) -> list[str]:
        """Return for each data set the one whose embedding and expert it uses."""
        return [self.dataset_mapping.get(name, name) for name in self.datasets]


def build_potential(config: PotentialConfig) -> Potential:
    """Return a potential with fresh weights (float32, from torch's current random state)."""
    model, names = config.model, config.dataset_representatives()
    rows = [config.datasets.index(name) for name in names] if model.dataset_embedding else []
    hidden = (model.hidden_channels, model.hidden_channels) if config.energy_head == "mlp" else ()
    expert_of = (
        [sorted(set(names)).index(name) for name in names] if config.dataset_heads == "experts" else []
    )
    heads: dict[str, nn.Module] = {"energy": EnergyHead(model.channels, hidden, expert_of)}
    if config.heads == "direct":
        heads["forces"] = ForceHead(model.channels)
    if config.stress_head:
        heads["stress"] = StressHead(model.channels, model.hidden_channels, config.stress_reduce)
    potential = Potential(EscnMD(model, rows), heads, datasets=config.datasets, elements=config.elements)
    potential.config, potential.merged_for = config, config.merged_for
    return potential


def to_dict(config: PotentialConfig) -> dict[str, Any]:
    """Return the configuration as plain data that JSON can hold."""
    return asdict(config)


def from_dict(data: Mapping[str, Any]) -> PotentialConfig:
    """Return the configuration that `to_dict` wrote, also after a trip through JSON.

    Raises:
        ValueError: an unknown key, or a value that the configuration refuses.
    """
    given = dict(data)
    model = dict(given.get("model", {}))
    if model.get("experts") is not None:
        model["experts"] = _filled(ExpertsConfig, model["experts"])
    given["model"] = _filled(EscnMDConfig, model)
    if given.get("merged_for") is not None:
        given["merged_for"] = _filled(MergedFor, given["merged_for"])
    return _filled(PotentialConfig, given)


def _filled(cls: type[T], data: Mapping[str, Any]) -> T:
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    unknown = [key for key in data if key not in known]
    if unknown:
        raise ValueError(f"{cls.__name__} has no {', '.join(unknown)}; it has {', '.join(known)}")
    return cls(**data)
