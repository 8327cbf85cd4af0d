"""Streaming observables against plain numpy on gathered frames, and on several ranks against one."""

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.data import atomic_masses
from ase.neighborlist import neighbor_list
from numpy.testing import assert_allclose

from gnnmd.md import NVE, Langevin
from gnnmd.md.reporters import MSD, RDF, VACF, Average, Callback, Frame, Profile
from gnnmd.md.reporters.average import _SCALARS
from gnnmd.models.emt import emt
from gnnmd.units import BOLTZMANN
from tests.md.ranks import DYNAMICS, alloy, loop_of, run, run_on_pool
from tests.parallel.pool import WorkerPool

INTERVAL, LAST = 4, 54  # the last step is reported, but is no sample
SAMPLED = range(0, LAST, INTERVAL)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that fail leave their last good state in the working directory."""
    monkeypatch.chdir(tmp_path)


def observables() -> list:
    return [
        RDF(INTERVAL, bins=60),
        RDF(5 * INTERVAL, r_max=8.0, bins=40),
        MSD(INTERVAL, lags=12, origins=4),
        VACF(INTERVAL, lags=8, origins=8),
        Profile(INTERVAL, axis=2, bins=7),
        Average(INTERVAL),
    ]


@cache
def reference() -> tuple[list, list[Frame], list]:
    """Return the observables of two runs on one rank, the frames at their samples, and what they saved."""
    found, frames = observables(), []
    watch = Callback(frames.append, INTERVAL, gather=("positions", "velocities", "forces"), stress=True)
    saved, rows, loop = run(None, alloy(), [*found, watch], (30, LAST))
    for place, row in rows:
        assert place == len(found)
        watch.show(row)
    assert loop.engine.counters.rebuilds > 2
    return found, [frame for frame in frames if frame.step % INTERVAL == 0], saved


def test_pairs_are_counted_as_ase_counts_them():
    found, frames, _ = reference()
    assert [frame.step for frame in frames] == list(SAMPLED)
    for rdf, chosen in ((found[0], frames), (found[1], frames[::5])):
        result = rdf.result()
        r_max = emt().r_cut if rdf.r_max is None else rdf.r_max
        edges = np.linspace(0, r_max, rdf.bins + 1)
        volume = chosen[0].atoms.cell.volume
        shells = 4 / 3 * np.pi * np.diff(edges**3)
        counts = dict.fromkeys([("Cu", "Cu"), ("Cu", "Ag"), ("Ag", "Cu"), ("Ag", "Ag")], 0)
        for frame in chosen:
            i, j, d = neighbor_list("ijd", frame.atoms, r_max)
            symbols = np.array(frame.atoms.get_chemical_symbols())
            for a, b in counts:
                counts[a, b] = counts[a, b] + np.histogram(d[(symbols[i] == a) & (symbols[j] == b)], edges)[
                    0
                ] / len(chosen)
        assert set(result.pairs) == set(counts)
        assert result.samples == len(chosen)
        n = {a: (symbols == a).sum() for a in ("Ag", "Cu")}
        for (a, b), count in counts.items():
            assert_allclose(result.pairs[a, b], count * volume / (n[a] * n[b] * shells), atol=1e-12)
            assert_allclose(result.coordination[a, b], np.cumsum(count) / n[a], atol=1e-12)
        assert_allclose(result.g, sum(counts.values()) * volume / (len(symbols) ** 2 * shells), atol=1e-12)
        assert result.g.max() > 2


def test_displacements_are_those_from_all_origins_without_drift():
    found, frames, _ = reference()
    result, msd = found[2].result(), found[2]
    x = np.stack([frame.atoms.positions for frame in frames])
    masses = frames[0].atoms.get_masses()
    copper = frames[0].atoms.numbers == 29
    every = msd.lags // msd.origins
    for lag in range(msd.lags):
        moved = np.stack([x[o + lag] - x[o] for o in range(0, len(x) - lag, every)])
        moved = moved - np.einsum("i,oic->oc", masses, moved)[:, None] / masses.sum()
        squared = (moved**2).sum(2)
        assert result.origins[lag] == len(moved)
        assert_allclose(result.msd[lag], squared.mean(), atol=1e-12)
        assert_allclose(result.elements["Cu"][lag], squared[:, copper].mean(), atol=1e-12)
    assert_allclose(result.time, np.arange(msd.lags) * INTERVAL * DYNAMICS.timestep)
    assert result.msd[-1] > 0.05


def test_velocities_are_correlated_over_all_origins():
    found, frames, _ = reference()
    result = found[3].result()
    v = np.stack([frame.atoms.get_velocities() for frame in frames])
    masses = frames[0].atoms.get_masses()
    silver = frames[0].atoms.numbers == 47
    products = [(masses * (v[: len(v) - k] * v[k:]).sum(2)) for k in range(8)]  # [origins, N] for each lag
    expected = np.array([[p.sum(1).mean(), p[:, silver].sum(1).mean()] for p in products])
    assert_allclose(result.vacf, expected[:, 0] / expected[0, 0], atol=1e-12)
    assert_allclose(result.elements["Ag"], expected[:, 1] / expected[0, 1], atol=1e-12)


def test_profiles_are_those_of_slabs():
    found, frames, _ = reference()
    result = found[4].result()
    n, mass, kinetic, v_slab = np.zeros(7), np.zeros(7), np.zeros(7), frames[0].atoms.cell.volume / 7
    flow = np.zeros((7, 3, 3))
    for frame in frames:
        place = (frame.atoms.get_scaled_positions(wrap=True)[:, 2] * 7).astype(int)
        m, v = frame.atoms.get_masses(), frame.atoms.get_velocities()
        for i in range(7):
            here = place == i
            n[i] += here.sum()
            mass[i] += m[here].sum()
            kinetic[i] += (m[here] * (v[here] ** 2).sum(1)).sum()
            flow[i] += np.einsum("i,ia,ib->ab", m[here], v[here], v[here]) / v_slab
    assert_allclose(result.atoms, n / len(frames))
    assert_allclose(result.temperature, kinetic / (3 * n * BOLTZMANN))
    assert_allclose(result.density, mass / len(frames) / v_slab * units._amu * 1e3 * 1e24, rtol=1e-6)
    assert_allclose(result.kinetic_stress, -flow / len(frames), atol=1e-15)
    height = frames[0].atoms.cell.volume / np.linalg.norm(
        np.cross(frames[0].atoms.cell[0], frames[0].atoms.cell[1])
    )
    assert_allclose(result.planes, np.linspace(0, height, 8))


@pytest.mark.parametrize("left_handed", [False, True])
def test_traction_is_the_force_that_opens_a_gap_at_the_plane(left_handed):
    atoms, bins, h = alloy(), 3, 1e-4
    if left_handed:
        atoms.set_cell(atoms.cell.array[[1, 0, 2]])
    profile = Profile(1, axis=2, bins=bins)
    run(None, atoms, [profile], (0,))
    traction = profile.result().traction
    area = np.linalg.norm(np.cross(atoms.cell[0], atoms.cell[1]))
    for plane in range(bins):
        for component in range(3):
            energies = []
            for sign in (1, -1):
                opened = atoms.copy()
                above = opened.get_scaled_positions(wrap=True)[:, 2] >= plane / bins
                opened.wrap()
                opened.positions[above, component] += sign * h
                opened.cell[2, component] += sign * h
                energies.append(float(loop_of(None, opened, []).state.energy))
            slope = (energies[0] - energies[1]) / (2 * h)
            assert_allclose(traction[plane, component], slope / area, atol=1e-8)
    assert_allclose(traction[bins], traction[0], atol=1e-12)
    assert np.abs(np.diff(traction, axis=0)).max() > 1e-3


def test_a_slab_in_vacuum_carries_no_traction_outside():
    atoms = bulk("Ag", cubic=True) * (2, 2, 2)
    atoms.rattle(0.1, seed=4)
    atoms.center(vacuum=9.0, axis=2)
    atoms.positions[:, 2] -= 12.0  # across the boundary
    profile = Profile(1, bins=11)
    run(None, atoms, [profile], (0,))
    result = profile.result()
    empty = np.concatenate((result.atoms == 0, [False])) | np.concatenate(([False], result.atoms == 0))
    assert 4 < empty.sum() < 10
    assert_allclose(result.traction[empty], 0, atol=1e-12)
    assert np.abs(result.traction).max() > 1e-3


def test_means_are_those_of_the_samples():
    found, frames, _ = reference()
    result = found[5].result()
    for name in ("temperature", "potential_energy", "pressure", "conserved"):
        samples = np.array([frame.scalars[name] for frame in frames])
        assert_allclose(result[name].value, samples.mean(), rtol=1e-10, atol=1e-12)
        assert_allclose(result[name].std, samples.std(ddof=1), rtol=1e-5, atol=1e-9)
    assert_allclose(np.trace(result["stress"].value) / -3 / units.GPa, result["pressure"].value, rtol=1e-6)


def test_errors_of_means_know_that_samples_are_correlated():
    """An autoregressive series: its error is sqrt((1 + a) / (1 - a)) times that of independent samples."""
    a, n, rng = 0.9, 10_000, np.random.default_rng(0)
    average, series = Average(1), np.empty(n)
    x = 0.0
    for step in range(n):
        x = series[step] = a * x + rng.normal()
        measured = {**dict.fromkeys(_SCALARS, torch.tensor(x)), "stress": torch.zeros(3, 3)}
        average.report(SimpleNamespace(step=step, measured=lambda known=measured: known))
    exact = series.std() / np.sqrt(n) * np.sqrt((1 + a) / (1 - a))
    of_four = (series - series[0]).reshape(-1, 4).mean(1)
    assert_allclose(average._square[2, 0], (of_four**2).sum())
    found = average.result()["temperature"]
    assert_allclose(found.value, series.mean())
    assert_allclose(found.error, exact, rtol=0.2)
    assert found.block >= 32


@pytest.mark.parametrize(("size", "partition"), [(2, "auto"), (4, "index")])
def test_ranks_find_what_one_rank_finds(pool: WorkerPool, size, partition):
    saved = pool.run(size, run_on_pool, alloy(), observables(), (30, LAST), {"partition": partition})
    _, _, expected = reference()
    for ranks in saved:
        assert ranks[2] > 2  # rebuilds
        for mine, reference_one in zip(ranks[0], expected, strict=False):
            assert mine.keys() == reference_one.keys()
            for name, value in mine.items():
                assert value.dtype == reference_one[name].dtype
                assert_allclose(value, reference_one[name], rtol=1e-9, atol=1e-7, err_msg=name)


def first_half(group):
    """Run to step 30 and return what a restart would keep."""
    saved, _, loop = run(group, alloy(), observables(), (30,))
    known = loop.gather(("positions", "velocities"))
    columns = {name: loop.engine.plan.gather_owned(column) for name, column in loop.state.columns.items()}
    return saved, known, columns


def second_half(group, saved, known, columns):
    atoms = alloy()
    atoms.positions = known["positions"].numpy()
    reporters = observables()
    for reporter, one in zip(reporters, saved, strict=True):
        reporter.restore(one)
    state = {"velocities": known["velocities"], **columns}
    return run(group, atoms, reporters, (LAST,), columns=state, step=30)[0]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (4, 1)])
def test_a_restart_on_other_ranks_goes_on_as_if_nothing_had_happened(pool: WorkerPool, before, after):
    half = pool.run(before, first_half)[0]
    for saved in pool.run(after, second_half, *half):
        for mine, expected in zip(saved, reference()[2], strict=False):
            for name, value in mine.items():
                assert_allclose(value, expected[name], rtol=1e-7, atol=1e-6, err_msg=name)


def lonely(group, reporters):
    """Two atoms, one of which leaves the cell, on any number of ranks."""
    atoms = Atoms("Ag2", [(1, 1, 1), (3.5, 1, 1)], cell=[9, 9, 9], pbc=(True, True, False))
    return run(group, atoms, reporters, (25,))[0]


def test_ranks_without_atoms_take_part(pool: WorkerPool):
    one = lonely(None, observables())
    for saved in pool.run(4, lonely, observables()):
        for mine, expected in zip(saved, one, strict=True):
            for name, value in mine.items():
                assert_allclose(value, expected[name], rtol=1e-9, atol=1e-9, err_msg=name)


def test_the_vibrations_of_a_harmonic_series_are_at_its_frequency():
    vacf, period = VACF(interval=2, lags=400, origins=400), 250.0  # fs
    vacf.samples = 1
    time = np.arange(400) * 2 * 5.0
    vacf._facts = {
        "composition": torch.bincount(torch.tensor([47]), minlength=119),
        "timestep": torch.tensor(5.0),
        "origins": torch.ones(400, dtype=torch.int64),
        "first": torch.tensor(0),
    }
    vacf._total = {"products": torch.tensor(np.cos(2 * np.pi * time / period))[:, None]}
    result = vacf.result()
    peak = result.frequency[result.vdos.argmax()]
    assert abs(peak - 1e3 / period) < 1e3 / time[-1]
    assert_allclose(result.vdos.sum() * (result.frequency[1] - result.frequency[0]), 1)
    assert_allclose(result.elements_vdos["Ag"], result.vdos)


def test_a_random_walk_diffuses_as_it_should():
    msd = MSD(interval=1, lags=50, origins=10)
    time, coefficient = np.arange(50) * 2.0, 3e-5  # cm^2/s
    msd.samples = 1
    msd._facts = {
        "composition": torch.bincount(torch.tensor([47, 47]), minlength=119),
        "timestep": torch.tensor(2.0),
        "origins": torch.ones(50, dtype=torch.int64),
        "first": torch.tensor(0),
    }
    msd._total = {"products": torch.tensor(2 * (0.3 + 6 * coefficient * 10 * time))[:, None]}
    assert msd.result().diffusion(20, 90) == pytest.approx(coefficient)
    assert msd.result().diffusion(20, 90, "Ag") == pytest.approx(coefficient)
    with pytest.raises(ValueError, match="only 0 lags lie between 200 and 300 fs"):
        msd.result().diffusion(200, 300)


def test_velocities_of_lone_atoms_decay_with_the_friction():
    """Langevin dynamics of atoms that do not meet: C(t) = exp(-friction t)."""
    rng = np.random.default_rng(0)
    atoms = Atoms(
        "Ag8", np.stack(np.meshgrid([0, 50], [0, 50], [0, 50]), -1).reshape(-1, 3), cell=[100] * 3, pbc=True
    )
    atoms.positions += rng.uniform(0, 5, (8, 3))
    vacf = VACF(interval=1, lags=3, origins=3)
    run(
        None,
        atoms,
        [vacf],
        (400,),
        integrator=Langevin(timestep=5, temperature=300, friction=0.1),
        temperature=300,
    )
    assert_allclose(vacf.result().vacf, np.exp(-0.5 * np.arange(3)), atol=0.05)


def test_what_cannot_be_observed_is_refused():
    with pytest.raises(ValueError, match="no samples yet"):
        RDF().result()
    with pytest.raises(ValueError, match="no samples yet"):
        Average().result()
    with pytest.raises(ValueError, match="interval must be at least 1"):
        MSD(interval=0)
    with pytest.raises(ValueError, match="1 <= origins <= lags"):
        MSD(lags=5, origins=6)
    with pytest.raises(ValueError, match="cannot gather"):
        Callback(print, gather=("charges",))
    with pytest.raises(ValueError, match="under the name 'msd'"):
        run(None, alloy(), [MSD(5), MSD(10)], (0,))
    used = RDF(5)
    run(None, alloy(), [used], (10,))
    with pytest.raises(ValueError, match="up to step 10 of another simulation"):
        run(None, alloy(), [used], (10,))
    used = MSD(5)
    run(None, alloy(), [used], (0,))
    with pytest.raises(ValueError, match="belongs to another simulation"):
        run(None, alloy(), [used], (10,))
    molecule = Atoms("Ag2", [(0, 0, 0), (2.5, 0, 0)])
    with pytest.raises(ValueError, match="its volume is zero"):
        run(None, molecule, [Profile()], (0,))


def test_fixed_atoms_have_no_temperature():
    profile = Profile(1, bins=1)
    mobile = torch.ones(len(alloy()), 1, dtype=torch.float64)
    velocities = torch.zeros(len(alloy()), 3, dtype=torch.float64)
    mobile[::2] = 0
    velocities[1::2] = 0.01
    run(None, alloy(), [profile], (0,), columns={"mobile": mobile, "velocities": velocities})
    masses = atomic_masses[alloy().numbers]
    expected = masses[1::2].sum() * 3e-4 / (3 * len(masses[1::2]) * BOLTZMANN)
    assert_allclose(profile.result().temperature, expected)


def test_a_new_origin_is_not_lost_when_steps_are_repeated(monkeypatch):
    sums = []
    for margin in (0.95, 5.0):
        monkeypatch.setattr("gnnmd.md.engine.MARGIN", margin)
        msd = MSD(3, lags=6, origins=6)
        saved, _, loop = run(None, alloy(), [msd], (60,), integrator=NVE(timestep=5))
        sums.append((loop.engine.counters.repeated, saved[0]["products"]))
    assert sums[0][0] == 0
    assert sums[1][0] > 0
    assert_allclose(sums[1][1], sums[0][1], rtol=1e-12)
