"""What a simulation is, besides its atoms: the same on every rank, kept in restarts as plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import gnnmd.md
from gnnmd.md.guards import Limits
from gnnmd.md.integrators import Integrator
from gnnmd.md.reporters import Reporter

#: Fields of `Setup` that a restart does not keep: objects of the caller, and where the restart itself is.
_NOT_KEPT = ("reporters", "restart")


@dataclass(frozen=True)
class Setup:
    """Everything a rank needs to know to begin, besides the atoms.

    Attributes:
        integrator: the equations of motion.
        reporters: who looks at it.
        skin: Angstrom; None finds the cheapest in the first steps.
        seed: of all random numbers.
        limits: what stops it.
        partition: see `build_plan`.
        headroom: see `build_plan`.
        evaluation: see `Engine`.
        restart: folder of its restarts; None for none.
        restart_interval: steps between two of them.
        keep: how many stay.
    """

    integrator: Integrator
    reporters: Sequence[Reporter]
    skin: float | None
    seed: int
    limits: Limits
    partition: str = "auto"
    headroom: float = 0.0
    evaluation: str | None = None
    restart: Path | None = None
    restart_interval: int = 1000
    keep: int = 2

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: an interval or number of restarts below 1.
            TypeError: an integrator that no restart can keep.
        """
        if self.restart_interval < 1 or self.keep < 1:
            raise ValueError(
                "restart_interval and keep must be at least 1, got "
                f"restart_interval={self.restart_interval}, keep={self.keep}"
            )
        if self.restart is not None:
            to_plain(self.integrator)

    def kept(self) -> dict[str, Any]:
        """Return as plain data what a restart keeps."""
        return {f.name: to_plain(getattr(self, f.name)) for f in fields(self) if f.name not in _NOT_KEPT}

    @classmethod
    def resumed(cls, kept: Mapping[str, Any], changes: Mapping[str, Any]) -> "Setup":
        """Return what a restart kept, with changes.

        Raises:
            ValueError: the restart holds what this version does not know.
        """
        known = {f.name for f in fields(cls)}
        values = {
            name: from_plain(value) for name, value in kept.items() if name in known and name not in changes
        }
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in {*values, *changes}]
        if missing:
            raise ValueError(f"the restart lacks {', '.join(missing)}; it was changed by another program")
        return cls(**{**values, **changes})


def to_plain(value: Any) -> Any:
    """Return numbers, texts, tuples and dataclasses (with the name of their class) as JSON holds them.

    Raises:
        TypeError: anything else.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {
            "class": type(value).__name__,
            **{f.name: to_plain(getattr(value, f.name)) for f in fields(value) if f.init},
        }
    if isinstance(value, list | tuple):
        return [to_plain(entry) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"a restart keeps numbers, texts, tuples and dataclasses of these, not {type(value).__name__} "
        f"({value!r}): use such fields in the integrator, or no restart"
    )


def from_plain(value: Any) -> Any:
    """Return what `to_plain` was given; classes are found among the public ones of `gnnmd.md` only.

    Raises:
        ValueError: a class that is not one of these, or that has other fields.
    """
    if isinstance(value, list):
        return tuple(from_plain(entry) for entry in value)
    if not isinstance(value, dict):
        return value
    values = {name: from_plain(entry) for name, entry in value.items()}
    name = str(values.pop("class", ""))
    found = getattr(gnnmd.md, name, None) if name in gnnmd.md.__all__ else None
    if not (isinstance(found, type) and is_dataclass(found)):
        raise ValueError(
            f"the restart was written by an integrator {name!r} that gnnmd.md does not have; pass integrator="
        )
    try:
        return found(**values)
    except TypeError as error:
        raise ValueError(
            f"the restart describes {name} with other fields than this version has ({error}); pass "
            "integrator="
        ) from error
