from types import SimpleNamespace

import pytest
import torch

from gnnmd.md import tuning
from gnnmd.parallel import Ranks


def chosen(monkeypatch, *, rebuilding, calling, travel, compact):
    """Return the skin for given costs in seconds; a rebuild and a call are timed together."""
    clock = iter([0.0, rebuilding + calling, 0.0, calling])
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: next(clock))
    done = []
    plan = SimpleNamespace(r_cut=6.0, skin=1.0, rebuild=lambda *_: done.append("rebuild"))
    evaluation = SimpleNamespace(spared=compact, begin_anew=lambda: done.append("begin anew"))
    engine = SimpleNamespace(
        plan=plan,
        ranks=Ranks(),
        call=lambda _: done.append("call"),
        evaluation=evaluation,
        travel=travel,
    )
    s = SimpleNamespace(positions=torch.zeros(1, 3), cell=torch.eye(3))
    skin = tuning.cheapest_skin(engine, s)
    assert done == ["rebuild", "begin anew", "call", "call"]
    return skin


SOLID = [(steps, 0.05 * steps**0.5) for steps in range(1, 30)]


def test_cheap_rebuilds_want_a_narrow_skin_and_dear_ones_a_wide_skin(monkeypatch):
    cheap = chosen(monkeypatch, rebuilding=1e-3, calling=1.0, travel=SOLID, compact=False)
    dear = chosen(monkeypatch, rebuilding=10.0, calling=1e-3, travel=SOLID, compact=False)
    assert cheap == min(tuning.SKINS)
    assert dear == max(tuning.SKINS)


def test_a_network_that_is_spared_the_skin_gets_a_wider_one(monkeypatch):
    spared, not_spared = (
        chosen(monkeypatch, rebuilding=0.1, calling=1.0, travel=SOLID, compact=compact)
        for compact in (True, False)
    )
    assert spared > not_spared


def test_what_happened_before_the_first_look_is_no_reason_for_a_narrow_skin(monkeypatch):
    looked = [(10, 0.4), (20, 0.55), (29, 0.65)]
    assert tuning._interval(looked, 0.2) == pytest.approx(2.5)
    assert chosen(monkeypatch, rebuilding=10.0, calling=1.0, travel=looked, compact=False) > 0.5


@pytest.mark.parametrize(("skin", "steps"), [(0.2, 4), (0.1, 1), (1.0, 29 * (0.5 / SOLID[-1][1]) ** 2)])
def test_intervals_are_those_that_were_seen_or_grow_with_the_square(skin, steps):
    assert tuning._interval(SOLID, skin) == pytest.approx(steps)
