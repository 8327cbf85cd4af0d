import numpy as np
import pytest
from ase.units import kg

from gnnmd.bench.protocol import in_processes, jittered, milliseconds, silver, water


def test_structures_are_dense_and_the_same_every_time():
    atoms = water(192)
    assert len(atoms) == 192
    assert atoms.get_masses().sum() / atoms.cell.volume / kg * 1e27 == pytest.approx(1.0, abs=0.005)
    oxygen = atoms[atoms.numbers == 8]
    distances = oxygen.get_all_distances(mic=True)[np.triu_indices(64, 1)]
    assert distances.min() > 2.3
    assert len(silver(108)) == 108
    for make in (water, silver):
        n = 192 if make is water else 256
        np.testing.assert_array_equal(make(n).positions, make(n).positions)
        with pytest.raises(SystemExit, match=r"100 is not"):
            make(100)


def test_every_call_sees_other_positions():
    frames = jittered(silver(32))
    first, second = next(frames).positions.copy(), next(frames).positions.copy()
    assert 0.001 < np.abs(first - second).max() < 0.1


def test_calls_are_counted_after_the_warm_up():
    seen = []
    assert len(milliseconds(seen.append, 2, 3)) == 3
    assert seen == [0, 1, 0, 1, 2]


def test_every_size_has_a_process_of_its_own(capfd):
    script = ["-c", "import os, sys; print(os.environ['OMP_NUM_THREADS'], sys.argv[1:])"]
    assert in_processes(script, [32, 108], ["--x"], 1) == 0
    assert capfd.readouterr().out.splitlines() == [f"1 ['--x', '--atoms', '{n}']" for n in (32, 108)]
    assert in_processes(["-c", "raise SystemExit(1)"], [1, 2], [], 1) == 1
