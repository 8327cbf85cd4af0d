"""Correlations in time, from several origins at once: diffusion and vibrations.

What an atom was at the last few origins travels with it from rank to rank in a column of the state.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gnnmd.md.reporters.base import View
from gnnmd.md.reporters.observable import Observable
from gnnmd.md.state import State


@dataclass(eq=False)
class Correlation(Observable):
    """Averages of a function of one atom now and at an earlier time, over atoms and origins.

    Attributes:
        interval: steps between two samples.
        lags: how many: correlations reach up to ``(lags - 1) * interval`` steps.
        origins: how many are kept at once; each costs 24 bytes per atom. A new one begins every
            ``lags / origins`` samples (rounded up), and replaces the oldest.
        name: of the column; two of a kind in one simulation need different ones.
    """

    interval: int = 10
    lags: int = 100
    origins: int = 10
    name: str = ""

    _sums = ("products",)

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if not 1 <= self.origins <= self.lags:
            raise ValueError(
                f"{type(self).__name__} needs 1 <= origins <= lags, got origins={self.origins}, "
                f"lags={self.lags}"
            )

    def begin(self, view: View) -> None:
        """Make room in the state. Collective."""
        columns, known = view.state.columns, bool(self._facts)
        if known and self.name not in columns:
            raise ValueError(
                f"this {type(self).__name__} belongs to another simulation: its atoms' past is not known "
                "here. Make a new one for each simulation"
            )
        if not known and self.name in columns:
            raise ValueError(
                f"two reporters keep what they need under the name {self.name!r}; give one of them another "
                "name="
            )
        super().begin(view)
        if not known:
            columns[self.name] = view.state.positions.new_zeros(len(view.state.ids), self.origins, 3)
            self._facts["origins"] = torch.zeros(self.lags, dtype=torch.int64)
            self._facts["first"] = torch.tensor(-1)

    def _zeros(self, view: View) -> dict[str, Tensor]:
        return {"products": torch.zeros(self.lags, len(self._numbers), dtype=torch.float64)}

    def _sample(self, view: View) -> None:
        s, sample = view.state, view.step // self.interval
        every, then = -(-self.lags // self.origins), s.columns[self.name]
        if self._facts["first"] < 0:
            self._facts["first"] = torch.tensor(sample)
        if sample % every == 0:
            then[:, sample // every % self.origins] = self._now(s)
        product = self._product(view, self._now(s), then)  # [n, origins]
        per_element = product.new_zeros(len(self._numbers), self.origins)
        per_element.index_add_(0, self._element_of[s.numbers], product)
        for block in range(sample // every, sample // every - self.origins, -1):
            lag = sample - block * every
            if block * every >= self._facts["first"] and lag < self.lags:
                self._partial["products"][lag] += per_element[:, block % self.origins]
                self._facts["origins"][lag] += 1

    def _now(self, s: State) -> Tensor:
        """Return ``[n, 3]`` what is correlated."""
        raise NotImplementedError

    def _product(self, view: View, now: Tensor, then: Tensor) -> Tensor:
        """Return ``[n, origins]`` the function of ``now`` ``[n, 3]`` and ``then`` ``[n, origins, 3]``."""
        raise NotImplementedError

    def _averages(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return lag times ``[L]`` fs, sums over atoms per origin ``[L, E]``, and the number of origins."""
        products, origins = self._found()["products"], self._facts["origins"].numpy()
        there = origins > 0
        times = np.arange(self.lags) * self.interval * float(self._facts["timestep"])
        return times[there], products[there] / origins[there, None], origins[there]


@dataclass(frozen=True)
class MeanSquaredDisplacement:
    """Mean squared displacements.

    Attributes:
        time: ``[L]`` lag, fs.
        msd: ``[L]`` of all atoms, Angstrom^2.
        elements: ``[L]`` of the atoms of each element.
        origins: ``[L]`` how many origins each lag was averaged over.
    """

    time: np.ndarray
    msd: np.ndarray
    elements: dict[str, np.ndarray]
    origins: np.ndarray

    def diffusion(self, begin: float, end: float, element: str | None = None) -> float:
        """Return the diffusion coefficient in cm^2/s: a sixth of the slope, fitted between two lags.

        Args:
            begin: fs; later than the atoms rattle in place.
            end: fs.
            element: symbol; None is all atoms.

        Raises:
            ValueError: fewer than two lags between them.
        """
        msd = self.msd if element is None else self.elements[element]
        there = (self.time >= begin) & (self.time <= end)
        if there.sum() < 2:
            raise ValueError(
                f"only {there.sum()} lags lie between {begin} and {end} fs; they reach from 0 to "
                f"{self.time[-1]} fs"
            )
        slope = np.polyfit(self.time[there], msd[there], 1)[0]
        return float(slope / 6 * 0.1)  # 1 A^2/fs is 0.1 cm^2/s


@dataclass(eq=False)
class MSD(Correlation):
    """Mean squared displacement of unwrapped positions, without the drift of the centre of mass.

    In a changing cell positions scale with it, and so do displacements: take a constant cell for diffusion.

    Attributes:
        interval: steps between two samples.
        lags: how many.
        origins: how many are kept at once.
        name: see `Correlation`.
    """

    name: str = "msd"

    def _now(self, s: State) -> Tensor:
        return s.positions

    def _product(self, view: View, now: Tensor, then: Tensor) -> Tensor:
        moved, masses = now[:, None] - then, view.state.masses
        drift = view.engine.total(masses[:, None, None] * moved) / view.engine.total(masses)
        return (moved - drift).square().sum(2)

    def result(self) -> MeanSquaredDisplacement:
        """Return what was sampled so far.

        Raises:
            ValueError: there are no samples.
        """
        time, sums, origins = self._averages()
        elements = {
            a: sums[:, i] / n for i, (a, n) in enumerate(zip(self.symbols, self._counts, strict=True))
        }
        return MeanSquaredDisplacement(time, sums.sum(1) / self._counts.sum(), elements, origins)


@dataclass(frozen=True)
class VelocityCorrelation:
    """Velocity autocorrelation and what it says about vibrations.

    Attributes:
        time: ``[L]`` lag, fs.
        vacf: ``[L]`` of all atoms, weighted with their masses; 1 at lag 0.
        elements: ``[L]`` of the atoms of each element; 1 at lag 0.
        origins: ``[L]`` how many origins each lag was averaged over.
        frequency: ``[L]`` THz.
        vdos: ``[L]`` vibrational density of states, 1/THz; its integral is 1.
        elements_vdos: ``[L]`` the share of each element in it; they add up to ``vdos``.
    """

    time: np.ndarray
    vacf: np.ndarray
    elements: dict[str, np.ndarray]
    origins: np.ndarray
    frequency: np.ndarray
    vdos: np.ndarray
    elements_vdos: dict[str, np.ndarray]


@dataclass(eq=False)
class VACF(Correlation):
    """Velocity autocorrelation, and by its Fourier transform the vibrational density of states.

    The density of states is the cosine transform of the mass-weighted autocorrelation (Dickey and Paskin,
    Phys. Rev. 188 (1969) 1407), here under a Hann window. Samples must be closer than half the shortest
    period: 20 fs for silver, 4 fs where hydrogen is.

    Attributes:
        interval: steps between two samples.
        lags: how many; frequencies are resolved to ``1 / (lags * interval * timestep)``.
        origins: how many are kept at once.
        name: see `Correlation`.
    """

    interval: int = 2
    lags: int = 500
    name: str = "vacf"

    def _now(self, s: State) -> Tensor:
        return s.velocities

    def _product(self, view: View, now: Tensor, then: Tensor) -> Tensor:
        return view.state.masses[:, None] * (now[:, None] * then).sum(2)

    def result(self) -> VelocityCorrelation:
        """Return what was sampled so far.

        Raises:
            ValueError: there are no samples, or the atoms are at rest.
        """
        time, sums, origins = self._averages()
        if not sums[0].any():
            raise ValueError("the velocities of all atoms are zero: there is nothing to correlate")
        frequency, transformed = _cosine_transform(sums, self.interval * float(self._facts["timestep"]))
        norm = transformed.sum() * (frequency[1] - frequency[0]) if len(frequency) > 1 else np.nan
        with np.errstate(invalid="ignore"):
            own = sums / sums[0]
        return VelocityCorrelation(
            time=time,
            vacf=sums.sum(1) / sums[0].sum(),
            elements=dict(zip(self.symbols, own.T, strict=True)),
            origins=origins,
            frequency=frequency,
            vdos=transformed.sum(1) / norm,
            elements_vdos=dict(zip(self.symbols, transformed.T / norm, strict=True)),
        )


def _cosine_transform(c: np.ndarray, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Return frequencies ``[L]`` THz and the transform ``[L, E]`` of an even function ``[L, E]`` of time."""
    window = np.cos(0.5 * np.pi * np.arange(len(c)) / len(c)) ** 2
    windowed = c * window[:, None]
    even = np.concatenate((windowed, windowed[:0:-1]))  # f(-t) = f(t), 2 L - 1 samples
    transformed = np.fft.rfft(even, axis=0).real
    return np.fft.rfftfreq(len(even), spacing * 1e-3), transformed
