"""The operations of a message-passing layer that exist in several versions, chosen by name."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from gnnmd.nn.activations import activation
from gnnmd.nn.edge_operations import EdgeOperations
from gnnmd.nn.scatter import TORCH, Groups, Loops, pair_rows, weighted_sums

#: Versions by name; "auto" is "triton" on a GPU that has it, else "torch".
KERNELS = ("auto", "torch", "triton")


@dataclass(frozen=True)
class Operations:
    """One version of these operations.

    Attributes:
        act: an activation, element-wise.
        loops: what sums over rows.
        fused: sum_e w_e act(x_e) over each group, ``[n, C]`` of w ``[E]`` and x ``[E, C]``; None = first one,
            then the other.
    """

    act: Callable[[Tensor], Tensor]
    loops: Loops = TORCH
    fused: Callable[[Tensor, Tensor, Groups], Tensor] | None = None

    def weighted_sums(self, w: Tensor, x: Tensor, groups: Groups, rows: Groups | None = None) -> Tensor:
        """See `gnnmd.nn.scatter.weighted_sums`."""
        return weighted_sums(w, x, groups, rows, loops=self.loops)

    def pair_rows(self, x: Tensor, i: Groups, y: Tensor, j: Groups) -> Tensor:
        """See `gnnmd.nn.scatter.pair_rows`."""
        return pair_rows(x, i, y, j, loops=self.loops)

    def activated_sums(self, w: Tensor, x: Tensor, groups: Groups) -> Tensor:
        """Return ``[n, C]``, the sums of w_e act(x_e) over each group."""
        if self.fused is not None:
            return self.fused(w, x, groups)
        return self.weighted_sums(w[:, None], self.act(x), groups).squeeze(1)


def chosen(name: str, device: torch.device) -> str:
    """Return the name that "auto" stands for on a device; other names as they are.

    Raises:
        ValueError: the name is not one of `KERNELS`, or Triton is asked for and missing.
    """
    if name not in KERNELS:
        raise ValueError(f"kernels {name!r} is not one of {', '.join(KERNELS)}; set one of these")
    if name == "triton" and not _has_triton():
        raise ValueError("kernels='triton' needs the package triton; install it, or set kernels='torch'")
    if name == "auto":
        return "triton" if device.type == "cuda" and _has_triton() else "torch"
    return name


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def operations(kernels: str, act: str, device: torch.device) -> Operations:
    """Return the operations by name.

    Args:
        kernels: one of `KERNELS`.
        act: name of the activation, see `gnnmd.nn.activations.activation`.
        device: where they will run.

    Raises:
        ValueError: see `chosen` and `activation`.
    """
    if torch.compiler.is_compiling() or chosen(kernels, device) == "torch":
        return Operations(activation(act))
    from gnnmd.kernels.triton_operations import triton_operations

    return triton_operations(act)


def edge_operations(kernels: str, device: torch.device) -> EdgeOperations:
    """Return a version of what a message of eSCN-MD consists of.

    Args:
        kernels: one of `KERNELS`.
        device: where it will run.

    Raises:
        ValueError: see `chosen`.
    """
    if torch.compiler.is_compiling() or chosen(kernels, device) == "torch":
        return EdgeOperations()
    from gnnmd.kernels.triton_edges import TritonEdgeOperations

    return TritonEdgeOperations()
