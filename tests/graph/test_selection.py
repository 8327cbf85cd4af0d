import pytest
import torch

from gnnmd.graph.selection import first_of


@pytest.mark.parametrize("room", [0, 3, 5, 9])
@pytest.mark.parametrize("wanted", [[0, 1, 1, 0, 0, 1], [1] * 6, [0] * 6, []])
def test_what_is_wanted_comes_first_and_nothing_comes_twice(wanted, room):
    flags = torch.tensor(wanted, dtype=torch.bool)
    places, n = first_of(flags, room)
    expected = [i for i, flag in enumerate(wanted) if flag]
    assert n == len(expected)
    assert places[: len(expected)].tolist() == expected[:room]
    assert len(set(places.tolist())) == len(places) == min(room, len(wanted))
