"""Which evaluation and which skin cost least: wide ones make steps dearer, narrow ones rebuilds frequent."""

import time
from collections.abc import Callable, Sequence

import torch

from gnnmd.md.engine import Engine
from gnnmd.md.state import State

#: Skins to choose from, Angstrom; the first steps are made with `FIRST_SKIN`.
SKINS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0)
FIRST_SKIN = 1.0
#: Steps that are watched before the choice.
WATCHED = 30


def cheapest(engine: Engine, s: State, skins: Sequence[float] = SKINS) -> tuple[str, float]:
    """Return the evaluation and the skin with the least time per step, as the first steps showed. Collective.

    Times are the slowest rank's, so every rank chooses the same. Steps between rebuilds are those after which
    the farthest atom had moved by half the skin; beyond what was seen, distances grow with the root of time.

    Args:
        engine: has made `WATCHED` steps; what it may choose from is tried.
        s: their last state.
        skins: to choose from, Angstrom.
    """
    plan = engine.plan
    ways = [_costs(engine, s, how) for how in engine.evaluation.choices]

    def edges(skin: float) -> float:
        """How many times more edges than with the skin that was measured."""
        return ((plan.r_cut + skin) / (plan.r_cut + plan.skin)) ** 3

    def cost(way: tuple[str, bool, float, float], skin: float) -> float:
        _, spared, calling, rebuilding = way
        step = calling if spared else calling * edges(skin)
        return step + rebuilding * edges(skin) / _interval(engine.travel, skin)

    best, skin = min(((way, skin) for way in ways for skin in skins), key=lambda x: cost(*x))
    return best[0], skin


def _costs(engine: Engine, s: State, how: str) -> tuple[str, bool, float, float]:
    """Return the evaluation, whether it spares the network the skin, and seconds of a call and of a rebuild.

    It is another one than it should be where that failed (a capture, for want of memory).
    """

    def seconds(work: Callable[[], None]) -> float:
        _wait(s)
        begun = time.perf_counter()
        work()
        _wait(s)
        return time.perf_counter() - begun

    def rebuild() -> None:
        engine.plan.rebuild(s.positions, s.cell[None])
        engine.evaluation.switch(how)
        engine.call(s, exact=False)  # may capture, as the first one after a rebuild does

    if how != engine.evaluation.how:
        engine.evaluation.switch(how)
        engine.call(s, exact=False)  # may compile
    both, calling = seconds(rebuild), seconds(lambda: engine.call(s, exact=False))
    found = torch.tensor([calling, max(both - calling, 0.0)], device=s.positions.device)
    calling, rebuilding = engine.ranks.max(found).tolist()
    return engine.evaluation.how, engine.evaluation.spared, calling, rebuilding


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
