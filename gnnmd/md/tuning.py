"""Which skin costs least: wide ones make steps dearer, narrow ones make plans be rebuilt more often."""

import time
from collections.abc import Callable

import torch

from gnnmd.md.engine import Engine
from gnnmd.md.state import State

#: Skins to choose from, Angstrom; the first steps are made with `FIRST_SKIN`.
SKINS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0)
FIRST_SKIN = 1.0
#: Steps that are watched before the choice.
WATCHED = 30


def cheapest_skin(engine: Engine, s: State) -> float:
    """Return the skin with the least time per step, from what the first steps showed. Collective.

    Times are the slowest rank's, so every rank chooses the same. Steps between rebuilds are those after which
    the farthest atom had moved by half the skin; beyond what was seen, distances grow with the root of time.

    Args:
        engine: has made `WATCHED` steps.
        s: their last state.
    """
    plan, ranks = engine.plan, engine.ranks

    def seconds(work: Callable[[], None]) -> float:
        _wait(s)
        begun = time.perf_counter()
        work()
        _wait(s)
        return time.perf_counter() - begun

    def rebuild() -> None:
        plan.rebuild(s.positions, s.cell[None])
        engine.evaluation.begin_anew()
        engine.call(s)  # may capture, as the first one after a rebuild does

    both, calling = seconds(rebuild), seconds(lambda: engine.call(s))
    rebuilding = max(both - calling, 0.0)
    rebuilding, calling = ranks.max(torch.tensor([rebuilding, calling], device=s.positions.device)).tolist()

    def edges(skin: float) -> float:
        """How many times more edges than with the skin that was measured."""
        return ((plan.r_cut + skin) / (plan.r_cut + plan.skin)) ** 3

    def cost(skin: float) -> float:
        step = calling if engine.evaluation.spared else calling * edges(skin)
        return step + rebuilding * edges(skin) / _interval(engine.travel, skin)

    return min(SKINS, key=cost)


def _interval(travel: list[tuple[int, float]], skin: float) -> float:
    """Return after how many steps the farthest atom has moved by half the skin.

    Before it was looked at for the first time, an atom is taken to have moved steadily.
    """
    half = skin / 2
    reached = [steps * half / distance for steps, distance in travel if distance >= half]
    if reached:
        return max(min(reached), 1.0)
    steps, distance = max(travel, default=(1, 0.0), key=lambda seen: seen[1])
    return max(steps, 1) * (half / max(distance, 1e-6)) ** 2


def _wait(s: State) -> None:
    if s.positions.device.type == "cuda":
        torch.cuda.synchronize(s.positions.device)
