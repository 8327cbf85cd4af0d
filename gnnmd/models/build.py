"""From a plain configuration to a potential and back."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from torch import nn

from gnnmd.models.dpa2 import dpa2_potential
from gnnmd.models.dpa2_config import DPA2Config
from gnnmd.models.dpa3 import dpa3_potential
from gnnmd.models.dpa3_config import DPA3Config
from gnnmd.models.escn_md import EscnMD, EscnMDConfig
from gnnmd.models.heads import EnergyHead, ForceHead, StressHead
from gnnmd.models.potential import MergedFor, Potential

T = TypeVar("T")

ModelConfig = EscnMDConfig | DPA3Config | DPA2Config

#: Shapes of networks by their `type`.
MODELS: dict[str, type[ModelConfig]] = {"escn_md": EscnMDConfig, "dpa3": DPA3Config, "dpa2": DPA2Config}


@dataclass
class PotentialConfig:
    """Everything that is needed to rebuild a potential before its weights are loaded.

    Heads, data sets and their mapping are options of eSCN-MD; the DPA models have a conservative energy head
    of their own.

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

    model: ModelConfig = field(default_factory=EscnMDConfig)
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
        lmax = self.model.lmax if isinstance(self.model, EscnMDConfig) else 0
        if self.stress_head is None:
            self.stress_head = self.heads == "direct" and lmax >= 2
        if (self.heads == "direct" and lmax < 1) or (self.stress_head and lmax < 2):
            raise ValueError(
                f"direct forces need lmax >= 1 and a stress head needs lmax >= 2; lmax is {lmax}"
                if isinstance(self.model, EscnMDConfig)
                else f"{self.model.type} has no direct heads; use heads=conservative"
            )
        if len(self.datasets) > 1 and not isinstance(self.model, EscnMDConfig):
            raise ValueError(
                f"{self.model.type} does not tell data sets apart, but got {', '.join(self.datasets)}; train "
                "on one, or use model.type=escn_md"
            )

    def dataset_representatives(self) -> list[str]:
        """Return for each data set the one whose embedding and expert it uses."""
        return [self.dataset_mapping.get(name, name) for name in self.datasets]


def build_potential(config: PotentialConfig) -> Potential:
    """Return a potential with fresh weights (float32, from torch's current random state)."""
    if isinstance(config.model, DPA3Config):
        potential = dpa3_potential(config.model)
    elif isinstance(config.model, DPA2Config):
        potential = dpa2_potential(config.model)
    else:
        potential = _escn_md_potential(config, config.model)
    if config.elements:
        potential.elements = tuple(sorted(config.elements))
    potential.datasets = config.datasets
    potential.config, potential.merged_for = config, config.merged_for
    return potential


def _escn_md_potential(config: PotentialConfig, model: EscnMDConfig) -> Potential:
    names = config.dataset_representatives()
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
    return Potential(EscnMD(model, rows), heads)


def to_dict(config: PotentialConfig) -> dict[str, Any]:
    """Return the configuration as plain data that JSON can hold."""
    return asdict(config)


def from_dict(data: Mapping[str, Any]) -> PotentialConfig:
    """Return the configuration that `to_dict` wrote, also after a trip through JSON.

    Raises:
        ValueError: an unknown key, or a value that the configuration refuses.
    """
    given = dict(data)
    model = given.get("model", {})
    kind = model.get("type", "escn_md")  # what had no type was eSCN-MD
    if kind not in MODELS:
        raise ValueError(f"model type {kind!r} is not known; known are {', '.join(MODELS)}")
    given["model"] = _filled(MODELS[kind], model)
    return _filled(PotentialConfig, given)


def _filled(cls: type[T], data: Mapping[str, Any]) -> T:
    """Return a dataclass from plain data; sections become the dataclasses of their annotations."""
    hints = get_type_hints(cls)
    if unknown := [key for key in data if key not in hints]:
        raise ValueError(f"{cls.__name__} has no {', '.join(unknown)}; it has {', '.join(hints)}")
    values = {}
    for key, value in data.items():
        options: tuple[Any, ...] = get_args(hints[key]) or (hints[key],)
        sections = [option for option in options if isinstance(option, type) and is_dataclass(option)]
        values[key] = _filled(sections[0], value) if sections and isinstance(value, dict) else value
    return cls(**values)
