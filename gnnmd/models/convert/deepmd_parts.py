"""What the converters of deepmd-kit's models share: sections of options, and layers under our names.

Matrices are ``(in, out)`` there, y = x W + b, and ``(out, in)`` here.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gnnmd.models.convert.weights import Weights

State = dict[str, Tensor]


class Options:
    """A section of upstream's configuration, of which every option must be used.

    Args:
        section: options by name.
        name: of the section, for messages.
    """

    def __init__(self, section: Mapping[str, Any], name: str):
        self.name, self.left = name, dict(section)

    def take(self, option: str, default: Any) -> Any:
        """Return an option, or upstream's default."""
        return self.left.pop(option, default)

    def take_all(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Return several options by name, or upstream's defaults."""
        return {option: self.take(option, default) for option, default in defaults.items()}

    def require(self, option: str, *values: Any) -> None:
        """Refuse an option that has another value than these, of which the first is upstream's default."""
        if (value := self.take(option, values[0])) not in values:
            known = " or ".join(repr(v) for v in values)
            raise ValueError(f"{self.name}.{option}={value!r} is not supported, only {known}")

    def ignore(self, *options: str) -> None:
        """Drop options that change no number."""
        for option in options:
            self.left.pop(option, None)

    def check_complete(self) -> None:
        """Refuse options that nobody has asked for."""
        if self.left:
            raise ValueError(f"options {sorted(self.left)} of {self.name} are not known")


class DeepmdWeights(Weights):
    """Upstream's state dict; methods return entries for a state dict of this package."""

    def linear(self, own: str, up: str, *, bias: bool = True) -> State:
        """Return the weights of an `nn.Linear`."""
        state = {f"{own}.weight": self[f"{up}.matrix"].t()}
        return state | ({f"{own}.bias": self[f"{up}.bias"]} if bias else {})

    def residual_network(
        self, own: str, up: str, widths: Sequence[int], *, scaled: bool, bias: bool = True
    ) -> State:
        """Return the weights of a `ResNetMLP` with these widths."""
        state: State = {}
        for k, (n_in, n_out) in enumerate(pairwise(widths)):
            state |= self.linear(f"{own}.layers.{k}.linear", f"{up}.layers.{k}", bias=bias)
            if scaled and n_out in (n_in, 2 * n_in):
                state[f"{own}.layers.{k}.idt"] = self[f"{up}.layers.{k}.idt"]
        return state

    def network(self, up: str) -> str:
        """Return the prefix under which the network of a collection is stored.

        Every network is stored twice, under ``networks.0`` and ``_networks.0``; the latter is loaded last and
        wins if they differ. The other one counts as read.
        """
        if not self.has(f"{up}._networks.0."):
            return f"{up}.networks.0"
        self.read |= {key for key in self.state if key.startswith(f"{up}.networks.0.")}
        return f"{up}._networks.0"

    def embedding(self, own: str, up: str, *, bias: bool = False) -> State:
        """Return the weights of a `VectorEmbedding`."""
        return self.linear(f"{own}.layer.linear", f"{up}.embedding.embedding_net.layers.0", bias=bias)

    def statistics(self, own: str, up: str) -> State:
        """Return mean and deviations of an `Environment`.

        Upstream repeats them for every neighbour; the key followed by ``[:,0]`` may hold one row per type.

        Raises:
            ValueError: they differ from neighbour to neighbour.
        """
        state: State = {}
        for ours, theirs in [("mean", f"{up}.mean"), ("std", f"{up}.stddev")]:
            if f"{theirs}[:,0]" in self.state:
                rows = self[f"{theirs}[:,0]"]
            else:
                repeated = self[theirs]  # [T, neighbours, 4]
                rows = repeated[:, 0] if repeated.dim() == 3 else repeated
                if repeated.dim() == 3 and (repeated != rows[:, None]).any():
                    raise ValueError(f"{theirs} differs from neighbour to neighbour, which is not supported")
            state[f"{own}.{ours}"] = rows.to(torch.float64)
        return state

    def residuals(self, own: str, up: str, n: int) -> State:
        """Return the vectors of an `Update` with n updates."""
        rows = [self[f"{up}.{k}"] for k in range(n)]
        return {
            f"{own}.rho": torch.stack([row for row in rows if row.numel()] or rows)
        }  # missing ones are named later
