import json
import sys

import numpy as np
from ase.neighborlist import neighbor_list

from gnnmd.bench import dpa_gpu
from gnnmd.bench.records import silver


def test_edges_angles_and_parameters_are_those_of_the_peer(monkeypatch, capsys, tmp_path):
    table = tmp_path / "profile.txt"
    arguments = ["--atoms", "32", "--calls", "1", "--warmup", "0", "--device", "cpu", "--profile", "1"]
    monkeypatch.setattr(sys, "argv", ["dpa_gpu", *arguments, "--profile-file", str(table)])
    dpa_gpu.main()
    record = json.loads(capsys.readouterr().out)
    atoms = silver(32)
    near = np.bincount(neighbor_list("i", atoms, 4.0), minlength=32)
    assert record["edges"] == len(neighbor_list("i", atoms, 6.0))
    assert record["angles"] == (near**2).sum()
    assert record["parameters"] == 1_309_633  # deepmd-kit counts as many for one element
    assert record["ms_median"] > 0
    assert "aten::mm" in table.read_text()


def test_a_size_that_fails_leaves_a_record_and_the_others(monkeypatch, capsys):
    def measure(n_atoms, options):
        if n_atoms == 500:
            raise RuntimeError("CUDA out of memory\nmore")
        return {"atoms": n_atoms}

    monkeypatch.setattr(dpa_gpu, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["dpa_gpu", "--atoms", "500", "32"])
    dpa_gpu.main()
    failed, measured = map(json.loads, capsys.readouterr().out.splitlines())
    assert failed["error"] == "RuntimeError: CUDA out of memory"
    assert measured["atoms"] == 32
