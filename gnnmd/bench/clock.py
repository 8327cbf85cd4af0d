"""Times of calls that many ranks make together."""

import statistics
import time
from collections.abc import Callable

import torch

from gnnmd.parallel import Ranks


class Clock:
    """Medians of the slowest rank's time, milliseconds.

    Args:
        ranks: who makes the calls.
        device: where they compute.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._ranks, self._device = ranks, device

    def median(self, call: Callable[[], object], n: int) -> float:
        """Time ``n`` calls after two that warm up; collective."""
        times = []
        for _ in range(n + 2):
            self.synchronize()
            start = time.perf_counter()
            call()
            self._wait()
            times.append(self.maximum(1e3 * (time.perf_counter() - start)))
        return statistics.median(times[2:])

    def maximum(self, value: float) -> float:
        """Return the largest value of all ranks; collective."""
        return float(self._ranks.max(torch.tensor(value, dtype=torch.float64, device=self._ranks.device)))

    def synchronize(self) -> None:
        """Wait until all ranks and their GPUs have come here; collective."""
        self._ranks.sum(torch.zeros(1, device=self._ranks.device))
        self._wait()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
