from types import SimpleNamespace

import pytest
import torch

from gnnmd.md import tuning
from gnnmd.parallel import Ranks


class Evaluation:
    def __init__(self, spared, done):
        self.spared_by, self.done = spared, done
        self.choices = tuple(spared)
        self.how = self.choices[0]

    @property
    def spared(self):
        return self.spared_by[self.how]

    def switch(self, how):
        self.how = how
        self.done.append(how)

    def give_way(self):
        self.how = "way 1"


def chosen(monkeypatch, *costs, travel, fails=False):
    """Return the evaluation and the skin.

    Args:
        monkeypatch: of pytest.
        *costs: of every evaluation, whether it spares the network the skin, and the seconds of a call and of
            a rebuild, whose first call is timed with it.
        travel: of the engine.
        fails: whether the first evaluation gives way to the second when it is timed.
    """
    times = [t for _, calling, rebuilding in costs for t in (0.0, rebuilding + calling, 0.0, calling)]
    monkeypatch.setattr(tuning.time, "perf_counter", iter(times).__next__)
    done = []
    engine = SimpleNamespace(
        plan=SimpleNamespace(r_cut=6.0, skin=1.0, rebuild=lambda *_: done.append("rebuild")),
        ranks=Ranks(),
        call=lambda _, exact: done.append("call"),
        evaluation=Evaluation({f"way {i}": spared for i, (spared, *_) in enumerate(costs)}, done),
        travel=travel,
    )
    s = SimpleNamespace(positions=torch.zeros(1, 3), cell=torch.eye(3))
    if fails:
        monkeypatch.setattr(Evaluation, "switch", lambda evaluation, _: evaluation.give_way())
        return tuning.cheapest(engine, s)
    found = tuning.cheapest(engine, s)
    assert done[:4] == ["rebuild", "way 0", "call", "call"]
    assert done[4:] == [
        x for i in range(1, len(costs)) for x in (f"way {i}", "call", "rebuild", f"way {i}", "call", "call")
    ]
    return found


SOLID = [(steps, 0.05 * steps**0.5) for steps in range(1, 30)]


def test_cheap_rebuilds_want_a_narrow_skin_and_dear_ones_a_wide_skin(monkeypatch):
    _, cheap = chosen(monkeypatch, (False, 1.0, 1e-3), travel=SOLID)
    _, dear = chosen(monkeypatch, (False, 1e-3, 10.0), travel=SOLID)
    assert cheap == min(tuning.SKINS)
    assert dear == max(tuning.SKINS)


def test_a_network_that_is_spared_the_skin_gets_a_wider_one(monkeypatch):
    skins = [chosen(monkeypatch, (spared, 1.0, 0.1), travel=SOLID)[1] for spared in (True, False)]
    assert skins[0] > skins[1]


def test_what_happened_before_the_first_look_is_no_reason_for_a_narrow_skin(monkeypatch):
    looked = [(10, 0.4), (20, 0.55), (29, 0.65)]
    assert tuning._interval(looked, 0.2) == pytest.approx(2.5)
    assert chosen(monkeypatch, (False, 1.0, 10.0), travel=looked)[1] > 0.5


def test_the_faster_evaluation_is_chosen_with_its_own_skin(monkeypatch):
    quick, slow, dear = (False, 0.5, 0.1), (True, 1.0, 0.1), (False, 0.5, 5e3)
    assert chosen(monkeypatch, quick, slow, travel=SOLID)[0] == "way 0"
    assert chosen(monkeypatch, slow, quick, travel=SOLID) == (
        "way 1",
        chosen(monkeypatch, quick, travel=SOLID)[1],
    )
    assert chosen(monkeypatch, dear, slow, travel=SOLID)[0] == "way 1"  # its rebuilds cost too much


def test_an_evaluation_that_failed_when_it_was_timed_is_not_chosen(monkeypatch):
    """Dynamics would try it again, and end."""
    quick, slow = (False, 0.5, 0.1), (True, 1.0, 0.1)
    assert chosen(monkeypatch, quick, slow, travel=SOLID, fails=True)[0] == "way 1"
