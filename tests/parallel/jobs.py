"""What workers do in tests."""

import os
import signal
import time
from pathlib import Path

import torch

from gnnmd.parallel import Ranks


def total(ranks: Ranks, x: int) -> int:
    """Return the sum over ranks of x + rank."""
    return int(ranks.sum(torch.tensor(x + ranks.rank, device=ranks.device)))


def echo(ranks: Ranks, *args: object) -> tuple[object, ...]:
    """Return what arrived."""
    return args


def process_id(ranks: Ranks) -> int:
    """Return the process of this rank."""
    return os.getpid()


def touch(ranks: Ranks, path: Path) -> None:
    """Leave a file for every rank."""
    Path(f"{path}-{ranks.rank}").touch()


def fail(ranks: Ranks, rank: int) -> None:
    """Raise on one rank while the others wait for it."""
    if ranks.rank == rank:
        raise ValueError(f"rank {rank} is told to fail")
    ranks.sum(torch.zeros(1))


def fail_alike(ranks: Ranks) -> None:
    """Raise the same on all ranks, because of what one of them met."""
    with ranks.together("trying"):
        if ranks.rank == 0:
            raise ValueError("told to fail")


class Awkward(Exception):
    """An exception that cannot be pickled: made anew, it would lack an argument."""

    def __init__(self, a: str, b: str) -> None:
        super().__init__(a + b)


def fail_awkwardly(ranks: Ranks) -> None:
    """Raise what no pipe can carry."""
    raise Awkward("not ", "portable")


def die(ranks: Ranks, rank: int) -> None:
    """End one process while the others wait for it."""
    if ranks.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.sum(torch.zeros(1))


def rest(ranks: Ranks, seconds: float) -> None:
    """Let rank 0 rest while the others wait for it in a collective."""
    if ranks.rank == 0:
        time.sleep(seconds)
    ranks.sum(torch.zeros(1))
