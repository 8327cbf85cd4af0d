"""Training as one of several ranks, watched and, for negative controls, broken."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback
from torch import Tensor

from gnnmd.parallel import GPContext, Mesh, Ranks, TimedContext
from gnnmd.training import losses, report, run, strategy
from gnnmd.training.callbacks import STATE
from gnnmd.training.history import MEASURED
from gnnmd.training.settings import TrainConfig

#: How much too late a rank can be made to start an exchange, s.
LATE = 0.1


@dataclass
class Seen:
    """What one rank has seen while it trained.

    Attributes:
        losses: of every batch.
        gradient: of the first step as it is clipped, None where a parameter has none.
        n_ghost: ghosts of all batches together.
        n_owned: likewise.
    """

    losses: list[float] = field(default_factory=list)
    gradient: list[Tensor | None] = field(default_factory=list)
    n_ghost: int = 0
    n_owned: int = 0


class StopAt(Callback):
    """Asks to stop after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self._step:
            trainer.should_stop = True


class PressCtrlC(Callback):
    """Sends Ctrl-C to a process after a step, from one of the ranks."""

    def __init__(self, pid: int, step: int) -> None:
        self._pid, self._step = pid, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_rank == 1 and trainer.global_step == self._step:
            os.kill(self._pid, signal.SIGINT)


class Watch(Callback):
    """Fills in what is seen."""

    def __init__(self) -> None:
        self.seen = Seen()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.n_ghost += batch.gp.n_ghost
        self.seen.n_owned += batch.gp.n_owned

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not self.seen.gradient:
            parameters = pl_module.potential.parameters()
            self.seen.gradient = [None if p.grad is None else p.grad.clone() for p in parameters]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.losses.append(float(outputs["loss"]))


@dataclass
class Trained:
    """What a run leaves: columns of its table by name, both sets of weights, test errors, parity pairs.

    Attributes:
        times: the columns of seconds, which are not in the table.
    """

    seen: Seen
    table: dict[str, list[float]]
    weights: Tensor
    average: Tensor
    errors: dict[str, float]
    pairs: dict[str, Tensor]
    times: dict[str, list[float]]


def fit(group: Any, config: TrainConfig, fault: str = "") -> Trained | Seen:
    """Train; ranks other than the first return what they have seen."""
    ranks, watch, pairs = Ranks(group), Watch(), {}
    with ExitStack() as patches:
        patches.enter_context(patch.object(report, "save_learning_curve", lambda *_: None))
        patches.enter_context(
            patch.object(report, "save_parity_plot", lambda path, found, _: pairs.update(found))
        )
        if fault:
            patches.enter_context(FAULTS[fault](ranks))
        result = run.train_on(ranks, config, callbacks=[watch])
    if ranks.rank:
        return watch.seen
    header, *rows = [line.split(",") for line in (result.folder / "metrics.csv").read_text().splitlines()]
    state = torch.load(result.folder / STATE, weights_only=True)["state_dict"]
    return Trained(
        seen=watch.seen,
        table={
            name: [float(row[i]) for row in rows if row[i]]
            for i, name in enumerate(header)
            if name not in MEASURED
        },
        weights=_flat(state, "potential."),
        average=_flat(state, "average."),
        errors=result.errors,
        times={
            name.removesuffix("_seconds"): [float(row[i]) for row in rows]
            for i, name in enumerate(header)
            if name.endswith("_seconds")
        },
        pairs={name: torch.from_numpy(p).sort().values for name, p in pairs.items()},
    )


def stop_one(group: Any, config: TrainConfig, rank: int, step: int) -> str:
    """Train until one rank wants to stop; return the run folder."""
    ranks = Ranks(group)
    asking = [StopAt(step)] if ranks.rank == rank else []
    return str(run.train_on(ranks, config, callbacks=asking).folder)


def reduced(group: Any, present: list[list[bool]]) -> list[float | None]:
    """Return the gradients after the reduction, if parameter i of rank r has one where ``present[r][i]``."""
    ranks = Ranks(group)
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in present[0]]
    for i, p in enumerate(parameters):
        p.grad = torch.full((2,), 10.0**i * (1 + ranks.rank)) if present[ranks.rank][i] else None
    strategy.reduce_gradients(parameters, Mesh(ranks))
    return [None if p.grad is None else float(p.grad[1]) for p in parameters]


def fail(group: Any, config: TrainConfig, rank: int) -> None:
    """Train until one rank runs out of memory."""
    ranks = Ranks(group)

    class Fail(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if ranks.rank == rank and batch_idx == 2:
                raise MemoryError("no memory left on this rank")

    run.train_on(ranks, config, callbacks=[Fail()])


def _flat(state: dict[str, Tensor], prefix: str) -> Tensor:
    return torch.cat([w.double().flatten() for name, w in state.items() if name.startswith(prefix)])


def _reduction(wrong: Callable[[list[Any], Any], None]) -> Any:
    return patch.object(strategy, "reduce_gradients", wrong)


def _without_mean(parameters: list[Any], mesh: Any, right: Any = strategy.reduce_gradients) -> None:
    right(parameters, mesh)
    for p in parameters:
        if p.grad is not None:
            p.grad *= mesh.n_replicas


def _own_counts(sums: Any, weights: Any, gp: Any, mesh: Any, right: Any = losses.weighted_sum) -> Tensor:
    return right(sums, weights, gp)


def _seed_of(ranks: Ranks, right: Any = torch.manual_seed) -> Any:
    return patch.object(torch, "manual_seed", lambda seed: right(seed + ranks.rank))


def _late(ranks: Ranks, right: Any = GPContext.exchange) -> Any:
    def exchange(gp: GPContext, owned: Tensor) -> Tensor:
        if ranks.rank == 1 and isinstance(gp, TimedContext):
            time.sleep(LATE)
        return right(gp, owned)

    return patch.object(GPContext, "exchange", exchange)


#: What the tests must notice, and a random start that they must not.
FAULTS: dict[str, Callable[[Ranks], Any]] = {
    "no sum over ranks": lambda ranks: _reduction(lambda parameters, mesh: None),
    "no mean over replicas": lambda ranks: _reduction(_without_mean),
    "counts of one rank": lambda ranks: patch("gnnmd.training.module.weighted_sum", _own_counts),
    "repeated frames count": lambda ranks: patch("gnnmd.data.datamodule.AtomsLoader.repeats", _never),
    "other random start": _seed_of,
    "rank 1 is late": _late,
}


def _never(*_: Any) -> bool:
    return False
