import pytest
from ase.neighborlist import neighbor_list

from gnnmd.bench.ranks import measure
from gnnmd.bench.records import silver
from gnnmd.parallel import Ranks

PARTS = ("interior", "boundary", "pack", "communication", "backward_communication", "backward")


def records(group, n_atoms):
    options = {
        "channels": 4,
        "layers": 1,
        "edge_chunk": None,
        "kernels": "auto",
        "tf32": False,
        "no_stress": True,
        "calls": 1,
    }
    return measure(Ranks(group), n_atoms, options)


def test_both_ways_to_exchange_are_timed_on_the_same_edges_and_parts_add_up(pool):
    found = pool.run(2, records, 108)[0]
    assert [record["exchange"] for record in found] == ["all_to_all", "all_gather"]
    n_edges = len(neighbor_list("i", silver(108), 6.0))
    for record in found:
        assert record["edges"] == n_edges
        assert record["max_owned"] >= 54
        assert record["max_ghosts"] > 0
        assert record["edges"] / 2 <= record["max_edges"] < record["edges"]
        assert sum(record[part] for part in PARTS) == pytest.approx(record["call"])
        assert all(record[part] > 0 for part in ("graph", "interior", "pack", "one_exchange"))


def test_one_rank_does_not_communicate(pool):
    (record,) = pool.run(1, records, 32)[0]
    assert record["communication"] == record["boundary"] == 0
    assert record["interior"] + record["backward"] == pytest.approx(record["call"])
