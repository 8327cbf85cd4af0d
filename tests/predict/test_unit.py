import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from numpy.testing import assert_allclose

from gnnmd.graph import AtomBatch
from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.dpa3_config import DPA3Config
from gnnmd.models.escn_md import EscnMDConfig
from gnnmd.models.potential import Prediction
from gnnmd.predict import InferenceSettings, PredictUnit
from gnnmd.predict.batching import take_systems
from tests.lennard_jones import lennard_jones

FLOAT64 = InferenceSettings(dtype="float64")


def crystals(n: int = 6) -> list[Atoms]:
    """Crystals and clusters of different sizes, strained and rattled."""
    images = []
    for k in range(n):
        atoms = bulk("Ag", cubic=True) * (1 + k % 2, 1, 1 + k % 3)
        atoms.set_cell(atoms.cell * (1 + 0.01 * k), scale_atoms=True)
        atoms.rattle(0.1, seed=k)
        atoms.pbc = [True, True, k % 4 != 3]
        images.append(atoms)
    return images


def unit(**settings: object) -> PredictUnit:
    return PredictUnit(
        lennard_jones(), device="cpu", settings=InferenceSettings(**{"dtype": "float64", **settings})
    )


def assert_equal(a: Prediction, b: Prediction, tolerance: float = 1e-12) -> None:
    for name in ("energy", "forces", "stress", "node_energies"):
        assert_allclose(getattr(a, name), getattr(b, name), atol=tolerance, rtol=0, err_msg=name)


def joined(parts: list[Prediction]) -> Prediction:
    names = ("energy", "forces", "stress", "node_energies")
    return Prediction(*(torch.cat([getattr(p, name) for p in parts]) for name in names))


@pytest.mark.parametrize("limits", [{}, {"max_edges": 1}, {"max_edges": 700}, {"max_atoms": 9}])
def test_splitting_a_list_into_calls_changes_neither_values_nor_order(limits: dict[str, int]) -> None:
    images = crystals()
    whole = unit(max_edges=10**9).predict(images)
    singles = joined([unit().predict(atoms) for atoms in images])
    assert_equal(whole, singles)
    assert_equal(unit(**limits).predict(images), singles)


def test_limits_bound_the_calls() -> None:
    images = [bulk("Ag", cubic=True)] * 10  # 4 atoms, 18 neighbours within 5 A each
    for settings, calls in [
        ({"max_edges": 3 * 4 * 19}, 4),
        ({"max_edges": 1}, 10),
        ({"max_atoms": 20}, 2 + 1),
    ]:
        one = unit(**settings)
        one.predict(images)
        assert one.potential.backbone.n_calls == calls  # the limit in atoms alone: one call more, to measure


def test_memory_of_an_edge_is_measured_once_and_decides_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [bulk("Ag", cubic=True)] * 10
    monkeypatch.setattr("gnnmd.predict.evaluation._CPU_BUDGET", 0)  # room for nothing: one system per call
    one = unit()
    one.predict([Atoms("Ag"), *images])
    assert one.potential.backbone.n_calls == 11
    # r, its powers, the switch and the pair energies, 8 bytes each
    assert 5 * 8 < one._bytes_per_row < 60 * 8
    monkeypatch.setattr("gnnmd.predict.evaluation._CPU_BUDGET", 2.5 * 76 * one._bytes_per_row)
    one.potential.backbone.n_calls = 0
    one.predict(images)
    assert one.potential.backbone.n_calls == 5


def test_out_of_memory_halves_the_calls_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    images = crystals()
    one = unit()
    evaluate = one.evaluate

    def small(batch: AtomBatch, neighbors: object) -> Prediction:
        if len(batch.numbers) > 24:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return evaluate(batch, neighbors)

    monkeypatch.setattr(one, "evaluate", small)
    with pytest.warns(UserWarning, match="ran out of memory with [0-9]+ edges"):
        assert_equal(one.predict(images), unit().predict(images))
    with pytest.raises(MemoryError, match="108 atoms and 1944 edges does not fit the memory of cpu"):
        one.predict(bulk("Ag", cubic=True) * 3)


def test_network_precision_does_not_reach_sums_and_outputs() -> None:
    images = crystals()
    exact, single = unit().predict(images), unit(dtype="float32").predict(images)
    assert single.energy.dtype == single.forces.dtype == torch.float64
    assert_equal(single, exact, 1e-4)
    assert (single.forces - exact.forces).abs().max() > 1e-9  # float32 was really used


def test_potential_of_the_caller_stays_as_it_was() -> None:
    potential = lennard_jones().train()
    PredictUnit(potential, device="cpu").predict(bulk("Ag"))
    assert potential.training
    assert all(p.dtype == torch.float64 and p.requires_grad for p in potential.parameters())
    assert potential.backbone.n_calls == 0


def test_charge_and_dataset_come_from_info() -> None:
    potential = lennard_jones(datasets=("pbe", "scan"))
    images = crystals(4)
    for atoms, charge, dataset in zip(images, (0, 1, -2, 0), ("pbe", "pbe", "scan", "scan"), strict=True):
        atoms.info |= {"charge": charge, "dataset": dataset}
    neutral = [atoms.copy() for atoms in images]
    for atoms in neutral:
        atoms.info = {"dataset": "pbe"}
    one = PredictUnit(potential, device="cpu", settings=FLOAT64)
    ratio = one.predict(images).energy / one.predict(neutral).energy
    assert_allclose(ratio, [1.0, 1.1, 1.3, 1.5], rtol=1e-12)


def test_labels_and_results_of_the_input_do_not_interfere() -> None:
    atoms = bulk("Ag", cubic=True)
    atoms.info |= {"energy": "low", "stress": [1.0], "name": "x"}
    atoms.arrays["forces"] = np.arange(4)
    assert_equal(unit().predict(atoms), unit().predict(bulk("Ag", cubic=True)))


def test_a_molecule_has_no_stress_but_everything_else() -> None:
    prediction = unit().predict(molecule("CH3CH2OH"))
    assert prediction.stress.isnan().all()
    assert prediction.energy.isfinite().all()
    assert prediction.forces.shape == (9, 3)
    assert unit(stress=False).predict(bulk("Ag")).stress is None


def test_descriptors_on_request() -> None:
    images = crystals(3)
    assert unit().predict(images).descriptors is None
    assert unit(descriptors=True, max_edges=1).predict(images).descriptors.shape == (sum(map(len, images)), 1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_forces_inside_no_grad_and_inference_mode_of_the_caller(mode: type) -> None:
    images = crystals(3)
    expected = unit().predict(images)
    with mode():
        inside = unit()
        assert_equal(inside.predict(images), expected)
        batch = AtomBatch.from_ase(images)
        assert_equal(inside.predict(batch), expected)
        assert_equal(inside.evaluate(batch, inside.neighbor_list(batch)), expected)
    assert_equal(inside.predict(images), expected)


def test_autocast_of_the_caller_does_not_round() -> None:
    images = crystals(3)
    shape = EscnMDConfig(channels=8, hidden_channels=8, edge_channels=8, num_basis=8, lmax=1, mmax=1)
    settings = InferenceSettings(max_edges=1)
    one = PredictUnit(build_potential(PotentialConfig(shape)), device="cpu", settings=settings)
    expected = one.predict(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(one.predict(images), expected, 0)


@pytest.fixture(params=["none", "tf32", "ieee"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = request.param
    yield request.param
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("fails", [False, True])
def test_tf32_is_switched_during_the_call_only(precision: str, fails: bool) -> None:
    seen = []

    def look(*args: object) -> None:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        if fails:
            raise ArithmeticError

    for tf32 in (True, False):
        one = unit(dtype="float32", tf32=tf32)
        one.potential.backbone.register_forward_pre_hook(look)
        if fails:
            with pytest.raises(ArithmeticError):
                one.predict(bulk("Ag"))
        else:
            one.predict(bulk("Ag"))
        assert torch.backends.cuda.matmul.fp32_precision == precision
    assert seen == ["tf32", "ieee"]


def test_errors_at_the_door_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="empty list"):
        unit().predict([])
    with pytest.raises(ValueError, match="empty batch"):
        unit().predict(take_systems(AtomBatch.from_ase(bulk("Ag")), 0, 0))
    bad = bulk("Ag", cubic=True)
    bad.positions[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"atom 2 of system 1 is at \[.*nan.*\] \(1 atoms in all"):
        unit().predict([bulk("Ag"), bad])
    with pytest.raises(ValueError, match="atom 2 of system 0"):
        unit().evaluate(
            AtomBatch.from_ase(bad), unit().neighbor_list(AtomBatch.from_ase(bulk("Ag", cubic=True)))
        )
    with pytest.raises(ValueError, match="system 1 has no atoms"):
        unit().predict([bulk("Ag"), Atoms()])
    bad = bulk("Ag", cubic=True)
    bad.cell[0, 0] = np.inf
    with pytest.raises(ValueError, match="the cell of system 0 is not finite"):
        unit().predict(bad)
    with pytest.raises(ValueError, match="Au"):
        PredictUnit(lennard_jones(elements=(47,)), device="cpu").predict(bulk("Au"))
    with pytest.raises(ValueError, match="wb97"):
        PredictUnit(lennard_jones(datasets=("pbe",)), device="cpu").predict(_with_dataset("wb97"))


def _with_dataset(name: str) -> Atoms:
    atoms = bulk("Ag")
    atoms.info["dataset"] = name
    return atoms


def test_absent_gpu_is_an_error_and_none_falls_back_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda:1' was asked for.*sees 0 CUDA devices.*device='cpu'"):
        PredictUnit(lennard_jones(), device="cuda:1")
    assert PredictUnit(lennard_jones()).device.type == "cpu"


def test_progress_counts_every_system() -> None:
    done: list[int] = []
    unit(max_edges=500).predict(crystals(), progress=done.append)
    assert sum(done) == 6
    assert len(done) > 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it, and hides the warning itself
def test_compiled_network_predicts_the_same() -> None:
    images = crystals()
    assert_equal(unit(compile=True).predict(images), unit().predict(images), 1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_predicts_the_same_as_the_cpu() -> None:
    images = crystals()
    gpu = PredictUnit(copy.deepcopy(lennard_jones()), device="cuda", settings=FLOAT64)
    assert_equal(gpu.predict(images), unit().predict(images), 1e-10)


def test_compilation_is_refused_where_it_is_known_to_be_wrong() -> None:
    potential = build_potential(PotentialConfig(DPA3Config(type_map=("Ag",), nlayers=1)))
    with pytest.raises(ValueError, match=r"compile=True is not possible for DPA3"):
        PredictUnit(potential, device="cpu", settings=InferenceSettings(compile=True))
