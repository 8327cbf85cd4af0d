"""A potential that several processes evaluate together: workers of this one, or those started with it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from gnnmd.graph import AtomBatch
from gnnmd.models.potential import Potential, Prediction
from gnnmd.parallel import Ranks, Workers, World
from gnnmd.predict.capture import release_captures
from gnnmd.predict.partitioned import INPUT, PartitionedPotential
from gnnmd.predict.settings import InferenceSettings

#: In a worker process: its part of the one potential that it was started for.
_mine: PartitionedPotential


class WorkerPotential:
    """A `PartitionedPotential` in worker processes; the same methods, called from outside."""

    def __init__(self, potential: Potential, settings: InferenceSettings, workers: Workers) -> None:
        self._workers = workers
        workers.call(_receive, potential, settings)

    def evaluate(self, batch: AtomBatch, skin: float = 0.0) -> tuple[Prediction, bool]:
        """Evaluate a batch in one call of the network; see `PartitionedPotential.evaluate`."""
        first: tuple[Prediction, bool] = self._workers.call(_evaluate, _packed(batch), skin)[0]
        return first

    def on_ranks(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run ``function(share, *args)`` on every worker; return what the first one returns."""
        return self._workers.call(_on_share, function, *args)[0]

    def on_ranks_soon(self, function: Callable[..., Any], *args: Any) -> None:
        """Do so after the call that is under way, if there is one; for finalizers."""
        self._workers.call_soon(_on_share, function, *args)

    def rows(self, batch: AtomBatch) -> list[int]:
        """Return the number of edges and atoms of each system."""
        rows: list[int] = self._workers.call(_rows, _packed(batch))[0]
        return rows

    def row_limit(self) -> float:
        """Return how many edges and atoms may go into the next call; 0 means one system."""
        limit: float = self._workers.call(_row_limit)[0]
        return limit


@contextmanager
def evaluated_by(
    n: int, potential: Potential, settings: InferenceSettings, device: str
) -> Iterator[WorkerPotential | PartitionedPotential]:
    """Give a potential to n processes, which end or part with the context.

    Under torchrun or srun these are the n processes that were started together, and all of them call this;
    else they are n new ones.

    Raises:
        ValueError: n is not the number of processes that were started together, or not possible here.
    """
    world = World.from_environment()
    if world is None:
        with Workers(n, device) as workers:
            yield WorkerPotential(potential, settings, workers)
        return
    if n != world.size:
        raise ValueError(
            f"workers={n}, but torchrun or srun has started {world.size} processes, which are the workers: "
            f"set workers={world.size} or start {n}; with workers=None each of them computes for itself"
        )
    with world.joined(device) as ranks:
        together = PartitionedPotential(potential, settings, ranks)
        try:
            yield together
        finally:
            together.leave()
            release_captures()


def number_of_workers(workers: int | Literal["auto"] | None, device: torch.device) -> int | None:
    """Return how many processes are meant; None is this one alone.

    Args:
        workers: a number; "auto" is as many as torchrun or srun started together, else one per visible GPU.
        device: where they compute; one GPU with a number is one process.

    Raises:
        ValueError: another word.
    """
    if workers is None or isinstance(workers, int):
        return workers
    if workers != "auto":
        raise ValueError(f"workers={workers!r}: give a number of processes, 'auto' or None")
    world = World.from_environment()
    if world is not None:
        return world.size if world.size > 1 else None
    gpus = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 1
    return gpus if gpus > 1 else None


def check_alone(n: int | None) -> None:
    """Refuse workers to a command that torchrun or srun runs several times: each would write its files.

    Raises:
        ValueError: this is one of several processes.
    """
    world = World.from_environment()
    if n is not None and world is not None and world.size > 1:
        raise ValueError(
            f"workers={n}, but {world.size} processes run this command: start it once, it starts its workers "
            "itself (over several hosts, use a PredictUnit in a script of your own)"
        )


def _on_share(ranks: Ranks, function: Callable[..., Any], *args: Any) -> Any:
    answer = function(_mine.share, *args)
    return answer if ranks.rank == 0 else None


def _receive(ranks: Ranks, potential: Potential, settings: InferenceSettings) -> None:
    global _mine
    _mine = PartitionedPotential(potential, settings, ranks)


def _evaluate(ranks: Ranks, packed: dict[str, Any], skin: float) -> tuple[Prediction, bool] | None:
    answer = _mine.evaluate(_unpacked(packed), skin)
    return answer if ranks.rank == 0 else None


def _rows(ranks: Ranks, packed: dict[str, Any]) -> list[int]:
    return _mine.rows(_unpacked(packed))


def _row_limit(ranks: Ranks) -> float:
    return _mine.row_limit()


def _packed(batch: AtomBatch) -> dict[str, Any]:
    """Return what a prediction depends on as arrays: tensors take ten times as long to pickle."""
    arrays = {name: getattr(batch, name).detach().cpu().numpy() for name in INPUT}
    return {**arrays, "dataset": batch.dataset}


def _unpacked(packed: dict[str, Any]) -> AtomBatch:
    tensors = {name: torch.from_numpy(packed[name]) for name in INPUT}
    none = torch.tensor(torch.nan, dtype=torch.float64)
    n, n_systems = len(tensors["numbers"]), len(tensors["cell"])
    return AtomBatch(
        **tensors,
        dataset=packed["dataset"],
        energy=none.expand(n_systems),
        forces=none.expand(n, 3),
        stress=none.expand(n_systems, 3, 3),
    )
