"""Any Python function on gathered data, in the caller's process."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gnnmd.md.reporters.base import Reporter, View
from gnnmd.md.reporters.frames import Frame, atoms_of

_GATHERED = ("positions", "velocities", "forces")


@dataclass(eq=False)
class Callback(Reporter):
    """Calls a function with the whole system every few steps.

    The function stays in the caller's process (under torchrun or srun, the first one), so it may be anything:
    a lambda, a method of a plotter. It is called a little later than the step was made, with frames in their
    order; it cannot change the simulation. What it raises ends the run, on every rank.

    Attributes:
        function: called with a `Frame`.
        interval: steps between two calls.
        gather: what to gather of "positions", "velocities" and "forces"; positions always are.
        stress: compute the stress and the pressure.
    """

    function: Callable[[Frame], Any] | None
    interval: int = 100
    gather: Sequence[str] = ("positions", "velocities")
    stress: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        unknown = set(self.gather) - set(_GATHERED)
        if unknown:
            raise ValueError(f"Callback cannot gather {sorted(unknown)}; choose from {list(_GATHERED)}")
        self.needs_stress = self.stress

    def __getstate__(self) -> dict[str, Any]:
        """Leave the function behind: workers only gather."""
        return {**vars(self), "function": None}

    def report(self, view: View) -> dict[str, Any] | None:
        """Gather on the first rank. Collective."""
        rows = view.gather_on_first(
            "numbers", "masses", "mobile", *dict.fromkeys(("positions", *self.gather))
        )
        scalars = view.scalars()
        if rows is None:
            return None
        if not self.stress:
            scalars = {name: value for name, value in scalars.items() if name != "pressure"}
        arrays = {name: value.numpy() for name, value in rows.items()}
        return {"known": {**arrays, **view.whole(self.stress)}, "scalars": scalars}

    def show(self, row: dict[str, Any]) -> None:
        """Call the function."""
        known: dict[str, np.ndarray] = row["known"]
        scalars = row["scalars"]
        if self.function is not None:
            self.function(Frame(scalars["step"], scalars["time"], atoms_of(known), scalars))
