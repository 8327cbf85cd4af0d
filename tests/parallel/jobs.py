"""What workers do in tests."""

import os
import signal

import torch

from gnnmd.parallel import Ranks


def total(ranks: Ranks, x: int) -> int:
    """Return the sum over ranks of x + rank."""
    return int(ranks.sum(torch.tensor(x + ranks.rank, device=ranks.device)))


def fail(ranks: Ranks, rank: int) -> None:
    """Raise on one rank while the others wait for it."""
    if ranks.rank == rank:
        raise ValueError(f"rank {rank} is told to fail")
    ranks.sum(torch.zeros(1))


def die(ranks: Ranks, rank: int) -> None:
    """End one process while the others wait for it."""
    if ranks.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.sum(torch.zeros(1))
