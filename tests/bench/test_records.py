import json

from gnnmd.bench.records import print_record, provenance, silver


def test_the_crystal_has_the_nearest_possible_number_of_atoms_at_bulk_density():
    assert [len(silver(n)) for n in (1, 500, 2000, 62500)] == [4, 500, 2048, 62500]
    assert abs(silver(500).get_volume() / 500 - 4.09**3 / 4) < 1e-9


def test_a_record_names_the_commit_of_a_tree_without_history(monkeypatch, capsys):
    monkeypatch.setenv("GNNMD_COMMIT", "abc")
    print_record({"ms": 1.23456789, "edges": 20_000_001}, provenance())
    record = json.loads(capsys.readouterr().out)
    assert record["commit"] == "abc"
    assert record["command"]
    assert record["ms"] == 1.23457
    assert record["edges"] == 20_000_001
