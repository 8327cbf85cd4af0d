"""Buffers that must not lose digits when a model is cast."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Float64Buffers(nn.Module):
    """Module whose own buffers stay float64 (or integer) when the parameters are cast.

    `module.float()` casts every floating buffer. A table that went through float32 stays wrong by 1e-8 after
    `module.double()`, which is visible in a float64 model. Subclasses cast on use.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = self._buffers[name]
            assert moved is not None
            self._buffers[name] = buffer.to(moved.device)
        return self
