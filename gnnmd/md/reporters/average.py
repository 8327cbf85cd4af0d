"""Mean values with honest error bars: samples of a simulation are correlated."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gnnmd.md.reporters.base import Reporter, View
from gnnmd.md.reporters.observable import check_goes_on

#: Blocks of up to 2^40 samples.
_LEVELS = 40
_SCALARS = (
    "temperature",
    "potential_energy",
    "kinetic_energy",
    "total_energy",
    "conserved",
    "pressure",
    "volume",
)


@dataclass(frozen=True)
class Mean:
    """A mean over time.

    Attributes:
        value: the mean; for the stress ``[3, 3]``.
        error: its standard error, with correlations; NaN with fewer than two blocks.
        std: standard deviation of the samples.
        block: samples per block that the error was found with.
    """

    value: np.ndarray
    error: np.ndarray
    std: np.ndarray
    block: np.ndarray


@dataclass(eq=False)
class Average(Reporter):
    """Means of temperature (K), energies (eV), pressure (GPa), volume (A^3) and stress (eV/A^3).

    Errors come from blocks of 1, 2, 4, ... samples (Flyvbjerg and Petersen, J. Chem. Phys. 91 (1989) 461),
    all followed at once; of these the shortest is taken with ``B^3 > 2 n (e_B / e_1)^4``, where n is the
    number of samples and e_B the error from blocks of B (Lee et al., Phys. Rev. E 83 (2011) 066706), or the
    longest with at least two blocks.

    Attributes:
        interval: steps between two samples.
        after: first step that counts: what comes before is equilibration.
    """

    interval: int = 10
    after: int = 0

    needs_stress = True
    samples = 0
    _newest = -1

    def __post_init__(self) -> None:
        """Check the interval; begin without samples."""
        super().__post_init__()
        n = len(_SCALARS) + 9
        #: The first sample, which all others are taken relative to; sums over blocks of every length and of
        #: their squares; the first half of a block that is not complete. The same on every rank.
        self._origin = torch.zeros(n, dtype=torch.float64)
        self._sum, self._square, self._half = torch.zeros(3, _LEVELS, n, dtype=torch.float64).unbind()

    def begin(self, view: View) -> None:
        """Go where the state is."""
        check_goes_on(self, self._newest, view)
        self._to(view.state.positions.device)

    def report(self, view: View) -> None:
        """Take a sample; steps between two samples (the last of a run) are none. Collective."""
        if view.step % self.interval or view.step <= self._newest or view.step < self.after:
            return
        measured = view.measured()
        x = torch.cat((torch.stack([measured[name] for name in _SCALARS]), measured["stress"].flatten()))
        if not self.samples:
            self._origin = x.clone()
        x = x - self._origin
        self.samples, self._newest = self.samples + 1, view.step
        for level in range(_LEVELS):
            self._sum[level] += x
            self._square[level] += x.square()
            if (self.samples >> level) % 2:
                self._half[level] = x
                break
            x = (self._half[level] + x) / 2

    def saved(self) -> dict[str, Tensor]:
        """Return all sums, on the CPU."""
        return {
            "samples": torch.tensor(self.samples),
            "newest": torch.tensor(self._newest),
            "origin": self._origin.cpu().clone(),
            "blocks": torch.stack((self._sum, self._square, self._half)).cpu(),
        }

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Take back what `saved` returned."""
        device = self._sum.device
        self.samples, self._newest = int(saved["samples"]), int(saved["newest"])
        self._origin = saved["origin"].clone()
        self._sum, self._square, self._half = saved["blocks"].clone().unbind()
        self._to(device)

    def result(self) -> dict[str, Mean]:
        """Return the means by the names of `View.scalars`, and "stress" with its kinetic part.

        Raises:
            ValueError: there are no samples.
        """
        if not self.samples:
            raise ValueError(f"Average has no samples yet: run at least {self.interval} steps with it")
        values, errors, stds, blocks = self._estimate()
        found = {name: Mean(values[i], errors[i], stds[i], blocks[i]) for i, name in enumerate(_SCALARS)}
        rest = (a[len(_SCALARS) :].reshape(3, 3) for a in (values, errors, stds, blocks))
        return {**found, "stress": Mean(*rest)}

    def _estimate(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        levels = max(self.samples.bit_length() - 1, 1)  # all with at least two blocks
        counts = self.samples >> np.arange(levels)
        mean = self._sum.cpu().numpy()[:levels] / counts[:, None]
        spread = (self._square.cpu().numpy()[:levels] / counts[:, None] - mean**2).clip(min=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            error = np.sqrt(spread / (counts[:, None] - 1))  # [levels, values]
            ratio = np.where(error[0] > 0, error / error[0], 0)
        size = 2.0 ** np.arange(levels)[:, None]
        long_enough = size**3 > 2 * self.samples * ratio**4
        long_enough[-1] = True
        level = long_enough.argmax(0)
        value = self._origin.cpu().numpy() + mean[0]
        n = self.samples
        std = np.sqrt(spread[0] * n / (n - 1)) if n > 1 else np.full_like(value, np.nan)
        return value, np.take_along_axis(error, level[None], 0)[0], std, 2**level

    def _to(self, device: torch.device) -> None:
        self._origin = self._origin.to(device)
        self._sum, self._square, self._half = (x.to(device) for x in (self._sum, self._square, self._half))
