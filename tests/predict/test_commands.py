import re
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from numpy.testing import assert_allclose

from gnnmd.data.silver import load_silver
from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.escn_md import EscnMDConfig
from gnnmd.predict import InferenceSettings, PredictUnit, save_checkpoint
from gnnmd.predict.commands import evaluate, info, predict

SHAPE = EscnMDConfig(
    channels=8, hidden_channels=8, edge_channels=8, num_basis=8, lmax=1, mmax=1, num_layers=1
)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    torch.manual_seed(0)
    potential = build_potential(PotentialConfig(SHAPE, elements=(1, 6, 8, 47)))
    references = [0.0] * 119
    references[47] = -2.75
    save_checkpoint(
        "a.safetensors",
        potential,
        statistics={"element_energies": references, "force_rms": 0.5, "sizes": list(range(500))},
        extra={"epoch": 12, "test_errors": {"energy_mae@a.xyz": 0.0031, "forces_mae_Ag": 0.0402}},
    )
    return "a.safetensors"


def unit(checkpoint: str, **settings: object) -> PredictUnit:
    return PredictUnit.from_checkpoint(checkpoint, device="cpu", settings=InferenceSettings(**settings))


def test_info_tells_what_a_person_wants_to_know(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert info([checkpoint]) == 0
    text = capsys.readouterr().out
    for row in [
        r"parameters +│ [\d,]+ \(float32\)",
        r"cutoff +│ 6 A",
        r"elements +│ H C O Ag",
        r"data sets +│ one",
        r"written by +│ gnnmd \S+, torch \S+, format 1",
        r"model.channels +│ 8 ",
        r"element_energies +│ Ag -2.75",
        r"sizes +│ 500 values",
        r"epoch +│ 12",
        r"test_errors.energy_mae@a.xyz +│ 3.100 meV/atom",
        r"test_errors.forces_mae_Ag +│ 40.200 meV/A",
    ]:
        assert re.search(row, text), row


def frames() -> list[Atoms]:
    crystal, ethanol = bulk("Ag", cubic=True), molecule("CH3CH2OH")
    crystal.rattle(0.1, seed=1)
    crystal.info["name"] = "warm"
    return [crystal, ethanol, bulk("Ag")]


def test_workers_of_a_command(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write("in.extxyz", frames())
    command = [checkpoint, "in.extxyz", "--device", "cpu", "--dtype", "float64", "-o"]
    assert predict([*command, "one.extxyz"]) == predict([*command, "two.extxyz", "--workers", "1"]) == 0
    for one, two in zip(read("one.extxyz", ":"), read("two.extxyz", ":"), strict=True):
        assert_allclose(two.get_potential_energy(), one.get_potential_energy(), atol=1e-7)
        assert_allclose(two.get_forces(), one.get_forces(), atol=1e-7)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="workers=2, but 2 processes run this command: start it once"):
        predict([*command, "three.extxyz", "--workers", "2"])
    assert not Path("three.extxyz").exists()


def test_predictions_are_written_frame_by_frame(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("in.extxyz", frames())
    assert (
        predict([checkpoint, "in.extxyz", "-o", "out.extxyz", "--device", "cpu", "--dtype", "float64"]) == 0
    )
    assert "3 frames -> out.extxyz" in capsys.readouterr().out
    written = read("out.extxyz", index=":")
    expected = unit(checkpoint, dtype="float64").predict(read("in.extxyz", index=":"))
    assert_allclose([a.get_potential_energy() for a in written], expected.energy, atol=1e-7)
    assert_allclose(np.concatenate([a.get_forces() for a in written]), expected.forces, atol=1e-7)
    assert_allclose(
        np.concatenate([a.get_potential_energies() for a in written]), expected.node_energies, atol=1e-7
    )
    assert_allclose(written[0].get_stress(voigt=False), expected.stress[0], atol=1e-7)
    assert "stress" not in written[1].calc.results
    assert written[0].info["name"] == "warm"


def test_labels_of_the_input_do_not_reach_the_output(checkpoint: str) -> None:
    write("in.extxyz", load_silver("test")[:2])
    predict([checkpoint, "in.extxyz", "-o", "out.extxyz", "--device", "cpu"])
    labelled, written = read("in.extxyz", index=":"), read("out.extxyz", index=":")
    for before, after in zip(labelled, written, strict=True):
        assert abs(before.get_potential_energy() - after.get_potential_energy()) > 1


def test_evaluation_prints_the_errors_of_the_predictions(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = load_silver("test")[:3]
    write("labelled.extxyz", reference)
    assert evaluate([checkpoint, "labelled.extxyz", "--device", "cpu", "--plot", "new/parity.png"]) == 0
    text = capsys.readouterr().out
    prediction = unit(checkpoint).predict(reference)
    forces = np.concatenate([a.get_forces() for a in reference])
    mae = np.abs(prediction.forces.numpy() - forces).mean() * 1000
    assert re.search(rf"forces +{mae:.3f} .* meV/A\n", text)
    assert re.search(r"stress .* meV/A\^3\n", text)
    assert Path("new/parity.png").stat().st_size > 10_000


def test_evaluation_of_several_files_tells_elements_and_files_apart(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    silver = load_silver("test")[:2]
    rock = bulk("AgO", "rocksalt", a=4.8)
    rock.calc = SinglePointCalculator(rock, energy=-3.0, forces=np.full((2, 3), 0.1))
    write("a.extxyz", silver)
    write("b.extxyz", rock)
    assert evaluate([checkpoint, "a.extxyz", "b.extxyz", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "on a.extxyz, b.extxyz: 3 frames" in text
    wrong = [
        np.abs(f - unit(checkpoint).predict(a).forces.numpy())
        for a in (*silver, rock)
        for f in [a.get_forces()]
    ]
    oxygen, first, last = wrong[2][1:], np.concatenate(wrong[:2]), wrong[2]
    for title, error in [("O", oxygen), ("a.extxyz", first), ("b.extxyz", last)]:
        assert re.search(rf"forces {title} +{1000 * error.mean():.3f} .* meV/A\n", text), title
    assert re.search(r"energy b.extxyz .* meV/atom\n", text)
    assert "stress a.extxyz" in text
    assert "stress b.extxyz" not in text


def test_silver_is_the_built_in_test_set(
    checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    few = load_silver("test")[:2]
    monkeypatch.setattr("gnnmd.predict.commands.load_silver", lambda split: asked.append(split) or few)
    evaluate([checkpoint, "silver", "--device", "cpu", "--max-edges", "20000"])
    assert asked == ["test"]
    assert "a.safetensors on silver: 2 frames" in capsys.readouterr().out


def test_wrong_usage(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        predict([checkpoint, "in.extxyz", "-o", "out.cif"])
    assert "end its name in .extxyz, not '.cif'" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="in.extxyz"):
        predict([checkpoint, "in.extxyz", "-o", "out.extxyz"])
    write("bare.extxyz", [bulk("Ag")])
    with pytest.raises(ValueError, match="bare.extxyz, frame 0: there are no labels"):
        evaluate([checkpoint, "bare.extxyz"])
    with pytest.raises(ValueError, match="float16.*is not one of float32, float64"):
        predict([checkpoint, "bare.extxyz", "-o", "out.extxyz", "--dtype", "float16"])
