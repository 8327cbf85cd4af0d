"""Where the time of an epoch goes, measured without waiting for the device."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gnnmd.training.module import PotentialModule

#: Parts of an epoch, in the order in which a step goes through them.
PARTS = ("data", "graph", "forward_backward", "optimizer", "validation")
#: Of forward_backward: the waits for the ranks that share the graph.
COMMUNICATION = "communication"


class Mark(Protocol):
    """A point in time on a device; `torch.cuda.Event` is one."""

    def record(self) -> None:
        """Let this be now, after all that the device was given so far."""

    def query(self) -> bool:
        """Return whether the device has come that far, without waiting."""

    def elapsed_time(self, end: Any) -> float:
        """Return the milliseconds from here to ``end``."""


class HostMark:
    """The host's clock: right where the host computes."""

    def record(self) -> None:
        """Take the time."""
        self._at = time.monotonic()

    def query(self) -> bool:
        """Return True: the host is always where it is."""
        return True

    def elapsed_time(self, end: "HostMark") -> float:
        """Return the milliseconds from here to ``end``."""
        return 1e3 * (end._at - self._at)


class Spans:
    """Adds up named spans between marks; those that a device has not reached yet are looked at later."""

    def __init__(self, make: Callable[[], Mark]) -> None:
        self._make = make
        self._free: list[Mark] = []
        self._open: deque[tuple[str, Mark, Mark, bool]] = deque()
        self._seconds: dict[str, float] = {}

    def mark(self) -> Mark:
        """Return a mark at this moment."""
        found = self._free.pop() if self._free else self._make()
        found.record()
        return found

    def add(self, name: str, start: Mark, end: Mark, *, last: bool) -> None:
        """Add a span to ``name``; after the one with ``last`` its marks are used again."""
        self._open.append((name, start, end, last))
        self._collect()

    def take(self) -> dict[str, float]:
        """Return seconds by name and start afresh; spans the device is still in count in the next time."""
        self._collect()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _collect(self) -> None:
        while self._open and self._open[0][2].query():
            name, start, end, last = self._open.popleft()
            self._seconds[name] = self._seconds.get(name, 0.0) + start.elapsed_time(end) / 1e3
            self._free += [start, end] if last else [start]


class Stopwatch(Callback):
    """Splits the time of each epoch; must be the last callback, so that what others do in a step counts.

    - data: the host waits for the next batch and sends it;
    - graph: the host builds the graph, or the ranks plan and share it;
    - forward_backward: from there to the end of the backward pass, on the device;
      communication is the part of it in which a step waits for the ranks that share its graph;
    - optimizer: adding up gradients over ranks, clipping, the step, the average, agreeing to go on, saving
      inside an epoch; on the device;
    - validation: on the host.

    On a CPU these follow each other. A GPU works while the host reads the next batch, so there the parts may
    add up to more than the epoch. Events are only asked whether they are over: no step waits for them.
    """

    def __init__(self) -> None:
        self._spans = Spans(HostMark)
        self._host = dict.fromkeys(("data", "graph", "validation"), 0.0)
        self._ready = self._graph_before = self._validation_start = 0.0
        self._start: Mark | None = None
        self._middle: Mark | None = None

    def seconds(self) -> dict[str, float]:
        """Return the seconds of this rank by part since the start of the epoch."""
        return self._host | self._spans.take()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the clock of the device."""
        if pl_module.device.type == "cuda":
            self._spans = Spans(lambda: torch.cuda.Event(enable_timing=True))
        assert isinstance(pl_module, PotentialModule)
        pl_module.wait_clock = self._waiting

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start afresh."""
        self._spans.take()
        self._host = dict.fromkeys(self._host, 0.0)
        self._wait(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Add the time in which the batch was read and its graph built."""
        assert isinstance(pl_module, PotentialModule)
        graph = pl_module.graph_seconds - self._graph_before
        self._host["graph"] += graph
        self._host["data"] += time.monotonic() - self._ready - graph
        self._start = self._spans.mark()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark where the part of the ranks' own ends."""
        self._middle = self._spans.mark()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Add both parts of the step and wait for the next batch."""
        if self._start is not None and self._middle is not None:
            end = self._spans.mark()
            self._spans.add("forward_backward", self._start, self._middle, last=False)
            self._spans.add("optimizer", self._middle, end, last=True)
        self._start = self._middle = None
        self._wait(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the validation."""
        self._validation_start = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop it; what happens before the next batch does not count as reading data."""
        self._host["validation"] += time.monotonic() - self._validation_start
        self._wait(pl_module)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        start = self._spans.mark()
        yield
        self._spans.add(COMMUNICATION, start, self._spans.mark(), last=True)

    def _wait(self, module: LightningModule) -> None:
        assert isinstance(module, PotentialModule)
        self._ready, self._graph_before = time.monotonic(), module.graph_seconds
