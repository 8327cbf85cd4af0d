"""Choosing rows on a device without asking it how many there are."""

import torch
from torch import Tensor


def first_of(wanted: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Return the places where a ``[n]`` bool holds and then others, ``[min(room, n)]``, and how many hold.

    All places are different. The host does not wait.
    """
    n = len(wanted)
    count, others = wanted.cumsum(0), (~wanted).cumsum(0)
    slot = torch.where(wanted, count, wanted.sum() + others) - 1
    return torch.empty_like(slot).scatter(0, slot, torch.arange(n, device=slot.device))[:room], wanted.sum()
