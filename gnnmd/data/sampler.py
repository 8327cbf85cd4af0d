"""Batches bounded by frames, atoms or edges, the same on every run and after every restart."""

import math
import warnings
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import ArrayLike
from torch.utils.data import Sampler

#: Epochs packed in advance to settle the number of batches.
TRIAL_EPOCHS = 8


class AtomsBatchSampler(Sampler[list[int]]):
    """Cut every epoch's order of frames into batches that stay below the bounds.

    Every frame comes once per epoch. The order depends on (seed, epoch) only. The number of batches is the
    same in every epoch and on every replica, because trainers and learning-rate schedules count on it: an
    order that needs more batches than the trial epochs is drawn again, one that needs fewer gets its longest
    batches halved. Only when there are fewer frames than batches to hand out (small sets, many replicas) are
    batches repeated.

    Attributes:
        epoch: epoch whose batches the next iteration yields; set by `set_epoch`.
        position: batches of that epoch to skip; set by `load_state_dict`, for one iteration.
    """

    def __init__(
        self,
        n_atoms: ArrayLike,
        n_edges: ArrayLike | None,
        *,
        max_frames: int | None = None,
        max_atoms: int | None = None,
        max_edges: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        accumulate: int = 1,
    ):
        """Settle the number of batches.

        Args:
            n_atoms: ``[F]`` atoms per frame.
            n_edges: ``[F]`` edges per frame; None where nothing depends on them.
            max_frames: most frames in a batch.
            max_atoms: most atoms in a batch; a larger frame gets a batch of its own, with a warning.
            max_edges: most edges in a batch; likewise.
            shuffle: draw a new order every epoch.
            seed: of the orders.
            num_replicas: data-parallel replicas that share the batches of an epoch.
            rank: which of them this is.
            accumulate: batches that a replica takes for one step; none is left over at the end of an epoch.

        Raises:
            ValueError: no bound, a bound below 1, no frames, or a rank outside the replicas.
        """
        bounds = {"frames": max_frames, "atoms": max_atoms, "edges": max_edges}
        self._bounds = np.array([bound for bound in bounds.values() if bound is not None])  # [K]
        if not len(self._bounds) or self._bounds.min() < 1:
            raise ValueError(
                f"max_frames={max_frames}, max_atoms={max_atoms}, max_edges={max_edges} do not bound a "
                "batch. Set at least one of them, to 1 or more."
            )
        if n_edges is None and max_edges is not None:
            raise ValueError(f"max_edges={max_edges} needs the number of edges of every frame")
        atoms = np.asarray(n_atoms, dtype=np.int64)
        edges = np.zeros_like(atoms) if n_edges is None else np.asarray(n_edges, dtype=np.int64)
        if not len(atoms):
            raise ValueError("there are no frames to make batches of; check the data set")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank={rank} is not one of num_replicas={num_replicas}; ranks count from 0")
        sizes = {"frames": np.ones_like(atoms), "atoms": atoms, "edges": edges}
        names = [name for name, bound in bounds.items() if bound is not None]
        self._sizes = np.stack([sizes[name] for name in names], axis=1)  # [F, K]
        for name, bound in zip(names, self._bounds, strict=True):
            _warn_above(name, sizes[name], bound)
        self._shuffle, self._seed, self._num_replicas, self._rank = shuffle, seed, num_replicas, rank
        varied = shuffle and (self._sizes != self._sizes[0]).any()
        trials = range(TRIAL_EPOCHS if varied else 1)
        longest = max(len(self._pack(self._order(np.random.default_rng([seed, epoch])))) for epoch in trials)
        per_step = num_replicas * accumulate
        self._n_batches = per_step * math.ceil(longest / per_step)
        self.epoch = 0
        self.position = 0

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch on this replica."""
        return self._n_batches // self._num_replicas

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the frames of each batch, from `position` on."""
        start, self.position = self.position, 0
        yield from self._batches(self.epoch)[self._rank :: self._num_replicas][start:]

    def repeats(self, position: int) -> bool:
        """Tell whether all frames of this replica's batch at ``position`` of an epoch came before.

        Batches are repeated only when they are down to one frame each: all after the last frame.
        """
        return position * self._num_replicas + self._rank >= len(self._sizes)

    @property
    def sampler(self) -> "AtomsBatchSampler":
        """Itself: Lightning announces epochs to ``loader.batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; a position in another epoch is forgotten."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Return where the next iteration starts."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Let the next iteration start where ``state`` says."""
        self.epoch, self.position = state["epoch"], state["position"]

    def _batches(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng([self._seed, epoch])
        batches = self._pack(self._order(rng))
        while len(batches) > self._n_batches:
            batches = self._pack(self._order(rng))
        batches = _halve_longest(batches, self._n_batches)
        return [batches[i % len(batches)] for i in range(self._n_batches)]

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        n = len(self._sizes)
        return rng.permutation(n) if self._shuffle else np.arange(n)

    def _pack(self, order: np.ndarray) -> list[list[int]]:
        """Fill one batch after the other, each until its next frame would break a bound."""
        total = np.concatenate(
            [np.zeros((1, len(self._bounds)), dtype=np.int64), self._sizes[order].cumsum(axis=0)]
        )
        batches, start = [], 0
        while start < len(order):
            limits = total[start] + self._bounds
            ends = [np.searchsorted(total[:, k], limit, side="right") - 1 for k, limit in enumerate(limits)]
            end = max(int(min(ends)), start + 1)  # a frame above a bound goes alone
            batches.append(order[start:end].tolist())
            start = end
        return batches


def _halve_longest(batches: list[list[int]], n: int) -> list[list[int]]:
    """Halve the longest batches, in place of order, until there are ``n`` or none is left to halve."""
    while len(batches) < n and max(map(len, batches)) > 1:
        by_length = sorted(range(len(batches)), key=lambda i: -len(batches[i]))
        chosen = {i for i in by_length[: n - len(batches)] if len(batches[i]) > 1}
        parts = []
        for i, batch in enumerate(batches):
            half = len(batch) // 2
            parts += [batch[:half], batch[half:]] if i in chosen else [batch]
        batches = parts
    return batches


def _warn_above(name: str, sizes: np.ndarray, bound: int) -> None:
    above = int((sizes > bound).sum())
    if above:
        largest = int(sizes.argmax())
        warnings.warn(
            f"{above} of {len(sizes)} frames have more {name} than max_{name}={bound} (frame {largest}: "
            f"{sizes[largest]}). Each gets a batch of its own; raise max_{name} or remove them if memory "
            "runs out.",
            stacklevel=3,
        )
