"""A published state dict, of which every tensor must be used."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Weights:
    """A state dict that remembers what was read and what was not there.

    Args:
        state: tensors by the names of the package they come from.
    """

    def __init__(self, state: Mapping[str, Tensor]):
        self.state = dict(state)
        self.read: set[str] = set()
        self.missing: list[str] = []

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.state:
            self.missing.append(key)
            return torch.empty(0)
        self.read.add(key)
        return self.state[key]

    def has(self, prefix: str) -> bool:
        """Return whether a key begins so."""
        return any(key.startswith(prefix) for key in self.state)

    def check_complete(self) -> None:
        """Refuse a state dict in which something is missing or left over."""
        left = sorted(set(self.state) - self.read)
        if self.missing or left:
            raise ValueError(
                f"the weights do not fit the configuration: missing {self.missing or 'nothing'}, "
                f"not used {left or 'nothing'}. Check the options and the heads"
            )
