"""What streaming observables share: sums over samples that grow where the atoms are."""

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor

from gnnmd.md.reporters.base import Reporter, View
from gnnmd.parallel import Ranks

_N_ELEMENTS = len(chemical_symbols)


class Observable(Reporter):
    """Sums over samples, one every ``interval`` steps.

    Each rank adds up what its own atoms contribute, on its device and without waiting for it; the ranks' sums
    are added when a restart is written and when the run ends. Then the caller's object has them, and
    ``result()`` works there.

    Attributes:
        samples: how many there are.
    """

    samples = 0
    #: Names of the sums.
    _sums: tuple[str, ...] = ()
    _newest = -1
    _ranks = Ranks()

    def __post_init__(self) -> None:
        """Check the interval; begin without samples."""
        super().__post_init__()
        #: Sums of all ranks up to the last `saved`, on the CPU, and of this rank since then.
        self._total: dict[str, Tensor] = {}
        self._partial: dict[str, Tensor] = {}
        #: What does not grow by sums, the same on every rank, on the CPU.
        self._facts: dict[str, Tensor] = {}

    def begin(self, view: View) -> None:
        """Make room for the sums. Collective."""
        check_goes_on(self, self._newest, view)
        self._ranks = view.engine.ranks
        if not self._facts:
            self._facts = {
                "composition": composition(view),
                "timestep": torch.tensor(view.integrator.timestep, dtype=torch.float64),
            }
        device = view.state.positions.device
        self._element_of = torch.full((_N_ELEMENTS,), -1, device=device)
        self._element_of[self._numbers] = torch.arange(len(self._numbers), device=device)
        if not self._partial:
            self._partial = {name: zeros.to(device) for name, zeros in self._zeros(view).items()}

    def report(self, view: View) -> None:
        """Take a sample; steps between two samples (the last of a run) are none. Collective."""
        if view.step % self.interval or view.step <= self._newest:
            return
        self._sample(view)
        self.samples, self._newest = self.samples + 1, view.step

    def end(self, view: View) -> None:
        """Add up the ranks' sums. Collective."""
        self._add_up()

    def saved(self) -> dict[str, Tensor]:
        """Return all sums, on the CPU. Collective."""
        self._add_up()
        counters = {"samples": torch.tensor(self.samples), "newest": torch.tensor(self._newest)}
        return {**self._total, **self._facts, **counters}

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Take back what `saved` returned."""
        saved = {name: value.clone() for name, value in saved.items()}
        self.samples, self._newest = int(saved.pop("samples")), int(saved.pop("newest"))
        self._total = {name: saved.pop(name) for name in self._sums}
        self._facts = saved
        for partial in self._partial.values():
            partial.zero_()

    def _zeros(self, view: View) -> dict[str, Tensor]:
        """Return the sums before the first sample, on the CPU."""
        raise NotImplementedError

    def _sample(self, view: View) -> None:
        """Add one sample to ``self._partial``. Collective."""
        raise NotImplementedError

    @property
    def _numbers(self) -> Tensor:
        """``[E]`` atomic numbers of the elements there are."""
        return self._facts["composition"].nonzero()[:, 0]

    @property
    def symbols(self) -> list[str]:
        """Chemical symbols of the elements there are, in the order of their numbers."""
        return [chemical_symbols[z] for z in self._numbers.tolist()]

    @property
    def _counts(self) -> np.ndarray:
        """``[E]`` atoms of each element."""
        return self._facts["composition"][self._numbers].numpy()

    def _found(self) -> dict[str, np.ndarray]:
        """Return the sums of all ranks.

        Raises:
            ValueError: there are no samples.
        """
        if not self.samples:
            raise ValueError(
                f"{type(self).__name__} has no samples yet: run at least {self.interval} steps with it among "
                "the simulation's reporters"
            )
        return {name: total.numpy() for name, total in self._total.items()}

    def _add_up(self) -> None:
        for name, partial in self._partial.items():
            total = self._ranks.sum(partial).cpu()
            self._total[name] = self._total[name] + total if name in self._total else total.clone()
            partial.zero_()


def check_goes_on(reporter: Reporter, newest: int, view: View) -> None:
    """Refuse a reporter whose last sample was at a step that is yet to come.

    Raises:
        ValueError: with what to do.
    """
    if view.step < newest:
        raise ValueError(
            f"this {type(reporter).__name__} has samples up to step {newest} of another simulation; this one "
            f"is at step {view.step}. Make a new one for each simulation"
        )


def composition(view: View) -> Tensor:
    """Return ``[119]`` int64 how many atoms of each element all ranks have, on the CPU. Collective."""
    numbers = view.state.numbers
    counts = torch.zeros(_N_ELEMENTS, dtype=torch.int64, device=numbers.device)
    return view.engine.ranks.sum(counts.index_add_(0, numbers, torch.ones_like(numbers))).cpu()
