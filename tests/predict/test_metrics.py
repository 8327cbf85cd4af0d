import dataclasses

import numpy as np
import pytest
import torch
from ase import Atoms

from gnnmd.graph import AtomBatch
from gnnmd.models.potential import Prediction
from gnnmd.predict.metrics import ErrorMeter, error_table
from gnnmd.predict.parity_plot import Parity, save_parity_plot


def frame(n, seed, **missing):
    rng = np.random.default_rng(seed)
    atoms = Atoms(["Ag", "Cu"] * n, positions=rng.normal(size=(2 * n, 3)), cell=np.eye(3), pbc=True)
    atoms.info["energy"] = rng.normal()
    atoms.arrays["forces"] = rng.normal(size=(2 * n, 3))
    atoms.info["stress"] = rng.normal(size=(3, 3))
    for key in missing:
        (atoms.arrays if key == "forces" else atoms.info).pop(key)
    return atoms


def predicted(labels, seed):
    g = torch.Generator().manual_seed(seed)
    b, n = len(labels), len(labels.numbers)
    energy, forces, stress = (
        torch.randn(s, generator=g, dtype=torch.float64) for s in ((b,), (n, 3), (b, 3, 3))
    )
    return Prediction(energy, forces, stress, torch.zeros(n, dtype=torch.float64))


def test_errors_over_batches_are_those_of_all_frames_at_once():
    frames = [frame(1, 0), frame(3, 1), frame(2, 2)]
    whole = AtomBatch.from_ase(frames)
    p = predicted(whole, 0)
    meter = ErrorMeter(per_element=True)
    rows = torch.split(torch.arange(len(whole.numbers)), whole.n_atoms.tolist())
    for b, atoms in enumerate(frames):
        one = Prediction(
            p.energy[b : b + 1], p.forces[rows[b]], p.stress[b : b + 1], p.node_energies[rows[b]]
        )
        meter.update(one, AtomBatch.from_ase(atoms))
    errors = meter.errors()
    energy = ((p.energy - whole.energy) / whole.n_atoms).numpy()
    forces = (p.forces - whole.forces).numpy()
    stress = (p.stress - whole.stress).numpy()
    for name, error in (("energy", energy), ("forces", forces), ("stress", stress)):
        assert errors[f"{name}_mae"] == pytest.approx(np.abs(error).mean(), rel=1e-12)
        assert errors[f"{name}_rmse"] == pytest.approx(np.sqrt(np.square(error).mean()), rel=1e-12)
    silver = forces[whole.numbers.numpy() == 47]
    assert errors["forces_mae_Ag"] == pytest.approx(np.abs(silver).mean(), rel=1e-12)
    assert {k for k in errors if k.startswith("forces_mae_")} == {"forces_mae_Ag", "forces_mae_Cu"}


def test_missing_labels_do_not_count_and_a_quantity_without_labels_is_absent():
    frames = [frame(1, 0, energy=None, stress=None), frame(2, 1, forces=None, stress=None)]
    labels = AtomBatch.from_ase(frames)
    p = predicted(labels, 3)
    meter = ErrorMeter()
    meter.update(p, labels)
    errors = meter.errors()
    assert set(errors) == {"energy_mae", "energy_rmse", "forces_mae", "forces_rmse", "forces_cosine"}
    assert errors["energy_mae"] == pytest.approx(abs((p.energy[1] - labels.energy[1]).item()) / 4)
    assert errors["forces_mae"] == pytest.approx((p.forces[:2] - labels.forces[:2]).abs().mean().item())


@pytest.mark.parametrize("b", [0, 1, 2])
def test_errors_of_a_source_are_those_of_its_frames_alone(b):
    frames = [frame(1, 0), frame(3, 1, stress=None), frame(2, 2), frame(2, 3)]
    whole, source = AtomBatch.from_ase(frames), torch.tensor([0, 1, 2, 0])
    p = predicted(whole, 0)
    together = ErrorMeter(per_element=True, sources="abc")
    together.update(p, whole, source=source)
    alone = ErrorMeter()
    chosen, atoms = source == b, source[whole.system] == b
    part = Prediction(p.energy[chosen], p.forces[atoms], p.stress[chosen], p.node_energies[atoms])
    alone.update(part, AtomBatch.from_ase([f for f, s in zip(frames, source, strict=True) if s == b]))
    found = {k.removesuffix("@" + "abc"[b]): v for k, v in together.errors().items() if k[-1] == "abc"[b]}
    assert found == pytest.approx(alone.errors(), rel=1e-12)
    assert ("stress_mae" in found) == (b != 1)
    assert "forces_mae_Ag" in together.errors()


def test_one_element_and_one_source_are_not_told_twice():
    labels = AtomBatch.from_ase(Atoms("Ag2", [[0, 0, 0], [0, 0, 3]], info={"energy": 1.0}))
    labels = dataclasses.replace(labels, forces=torch.ones(2, 3).double())
    meter = ErrorMeter(per_element=True, sources=["a"])
    meter.update(predicted(labels, 0), labels)
    assert not [name for name in meter.errors() if "_Ag" in name or "@" in name]


def test_table_has_lines_for_elements_and_data_sets():
    errors = {"forces_mae": 0.05, "forces_rmse": 0.1, "forces_mae_Ag": 0.04, "forces_rmse_Ag": 0.09}
    errors |= {
        "forces_cosine": 1.0,
        "energy_mae@b/long name.xyz": 0.003,
        "energy_rmse@b/long name.xyz": 0.004,
    }
    head, *lines = error_table(errors).splitlines()
    assert [line.split(maxsplit=1)[0] for line in lines] == ["forces", "forces", "energy"]
    assert lines[1].split() == ["forces", "Ag", "40.000", "90.000", "meV/A"]
    assert lines[2].split() == ["energy", "b/long", "name.xyz", "3.000", "4.000", "meV/atom"]
    assert len({line.index(".000") for line in lines[1:]}) == 1  # aligned
    assert head.split() == ["MAE", "RMSE"]


def test_table_is_in_milli_units():
    text = error_table(
        {"energy_mae": 0.0012345, "energy_rmse": 0.002, "forces_mae": 0.05, "forces_rmse": 0.1}
    )
    assert text.splitlines()[1].split() == ["energy", "1.234", "2.000", "meV/atom"]
    assert text.splitlines()[2].split() == ["forces", "50.000", "100.000", "meV/A"]
    assert len(text.splitlines()) == 3


def test_parity_pairs_leave_missing_labels_out(tmp_path):
    labels = AtomBatch.from_ase(
        [frame(1, 0, energy=None, stress=None), frame(2, 1, forces=None, stress=None)]
    )
    p = predicted(labels, 0)
    parity = Parity()
    parity.update(p, labels)
    pairs = parity.pairs()
    assert {name: v.shape for name, v in pairs.items()} == {"energy": (2, 1), "forces": (2, 6)}
    np.testing.assert_allclose(pairs["energy"][:, 0], [labels.energy[1] / 4, p.energy[1] / 4])
    path = save_parity_plot(tmp_path / "parity.png", pairs, "two frames")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_parity_plot_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no labels"):
        save_parity_plot(tmp_path / "parity.png", {})


def test_prediction_that_is_nan_shows_in_the_errors():
    """Only a missing label may be left out; a broken model must not look perfect."""
    labels = AtomBatch.from_ase(Atoms("Ag2", [[0, 0, 0], [0, 0, 3]], info={"energy": 1.0}))
    nothing = torch.full((2, 3), torch.nan, dtype=torch.float64)
    meter = ErrorMeter()
    meter.update(Prediction(torch.tensor([torch.nan]).double(), nothing, None, nothing[:, 0]), labels)
    assert np.isnan(meter.errors()["energy_mae"])
    assert "forces_mae" not in meter.errors()  # no label, no error


def test_cosine_is_that_of_atoms_whose_force_has_a_direction():
    labels = AtomBatch.from_ase(Atoms("Ag4", np.eye(4, 3) * 3, info={"energy": 1.0}))
    forces = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 0], [torch.nan] * 3], dtype=torch.float64)
    labels = dataclasses.replace(labels, forces=forces)
    right, half = [5.0, 0, 0], [3.0**0.5, 1.0, 0]
    p = torch.tensor([right, half, [1.0, 1, 1], [1.0, 1, 1]], dtype=torch.float64)
    meter = ErrorMeter()
    meter.update(Prediction(labels.energy, p, None, p[:, 0]), labels)
    assert meter.errors()["forces_cosine"] == pytest.approx((1 + 0.5) / 2)
