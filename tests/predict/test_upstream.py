"""Files of fairchem-core 2.24.0 and what its predict unit said; see tests/golden/fairchem_files/README.md."""

import os
import pickle
import re
import zipfile
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from omegaconf import OmegaConf

from gnnmd import cli
from gnnmd.interfaces.ase import GNNMDCalculator
from gnnmd.predict import InferenceSettings, PredictUnit
from gnnmd.predict.checkpoint import load_checkpoint
from gnnmd.predict.upstream import _FairchemCheckpoint, _field, _plain, load_upstream
from tests.models.convert.test_deepmd import atoms_of, golden
from tests.upstream.make_deepmd_checkpoint import model, write

FILES = Path(__file__).parents[1] / "golden" / "fairchem_files"
FLOAT64 = InferenceSettings(dtype="float64")

#: Largest error relative to the largest force and stress. Scales of direct heads go into float32 weights.
TOLERANCE = {"esen": 1e-10, "uma": 1e-10, "esen_direct": 1e-7}

CASES = [("esen", "omat"), ("esen_direct", "omat"), ("esen_direct", "salex")]
CASES += [("uma", task) for task in ("omol", "omat", "oc20")]


@cache
def reference(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(FILES / f"{name}.npz"))


def structures(name: str) -> dict[str, Atoms]:
    arrays, found = reference(name), {}
    for system in sorted({key.split("/")[1] for key in arrays if key.startswith("sys/")}):
        z, x, cell, pbc = (
            arrays[f"sys/{system}/{key}"] for key in ("atomic_numbers", "positions", "cell", "pbc")
        )
        charge, spin = arrays[f"sys/{system}/charge_spin"].tolist()
        found[system] = Atoms(z, x, cell=cell, pbc=pbc, info={"charge": charge, "spin": spin})
    return found


def compare(unit: PredictUnit, name: str, task: str) -> None:
    arrays, systems = reference(name), structures(name)
    together = unit.predict(list(systems.values()))
    start = 0
    for b, (system, atoms) in enumerate(systems.items()):
        out = {q: arrays[f"out/{task}/{system}/{q}"] for q in ("energy", "forces", "stress")}
        stop = start + len(atoms)
        assert abs(together.energy[b].item() - out["energy"].item()) < 1e-10 * len(atoms)
        forces, stress = together.forces[start:stop].numpy(), together.stress[b].numpy()
        assert abs(forces - out["forces"]).max() < TOLERANCE[name] * abs(out["forces"]).max()
        assert abs(stress - out["stress"].reshape(3, 3)).max() < TOLERANCE[name] * abs(out["stress"]).max()
        start = stop


@pytest.mark.parametrize(("name", "task"), CASES)
def test_a_fairchem_file_gives_what_upstream_predicts(name, task):
    """Averaged weights, scales, references, heads and embeddings of the data set, charge and spin."""
    unit = PredictUnit.from_upstream(FILES / f"{name}.pt", task=task, device="cpu", settings=FLOAT64)
    compare(unit, name, task)


@pytest.mark.upstream
@pytest.mark.parametrize(("name", "task"), [("esen", "omat"), ("uma", "omol")])
def test_calculators_agree_on_random_structures(name, task):
    """Where fairchem-core is installed; its calculator says what it takes for a spin that is not given."""
    pytest.importorskip("fairchem.core", reason="needs fairchem-core")
    from fairchem.core import FAIRChemCalculator
    from fairchem.core.units.mlip_unit import InferenceSettings as Settings
    from fairchem.core.units.mlip_unit import MLIPPredictUnit

    path, rng = FILES / f"{name}.pt", np.random.default_rng(0)
    settings = Settings(base_precision_dtype="float64", activation_checkpointing=False)
    unit = MLIPPredictUnit(str(path), "cpu", inference_settings=settings)
    theirs = FAIRChemCalculator(unit, task_name=task)
    ours = GNNMDCalculator(PredictUnit.from_upstream(path, task=task, device="cpu", settings=FLOAT64))
    worst = np.zeros(3)
    for _ in range(20):
        n = int(rng.integers(2, 12))
        info = {"charge": int(rng.integers(-2, 3)), "spin": int(rng.integers(1, 4))}
        z, positions = rng.choice([1, 8, 11, 17, 29, 47], n), rng.random((n, 3)) * 6
        atoms = Atoms(z, positions, cell=6 * np.eye(3), pbc=True, info=info)
        found = []
        for calculator in (theirs, ours):
            atoms.calc = calculator
            found.append([atoms.get_potential_energy() / n, atoms.get_forces(), atoms.get_stress()])
        difference = [np.abs(a - b).max() / max(1.0, np.abs(a).max()) for a, b in zip(*found, strict=True)]
        worst = np.maximum(worst, difference)
    print(f"{name} {task}: energy per atom {worst[0]:.1e} eV, forces {worst[1]:.1e}, stress {worst[2]:.1e}")
    assert worst.max() < 1e-10


@pytest.mark.parametrize(("name", "task"), [("esen", None), ("uma", "omat")])
def test_a_converted_file_is_a_checkpoint_that_knows_where_it_comes_from(name, task, tmp_path, capsys):
    source, output = str(FILES / f"{name}.pt"), str(tmp_path / "a.safetensors")
    assert cli.main(["convert", source, output, *(["--task", task] if task else [])]) == 0
    with PredictUnit.from_checkpoint(output, device="cpu", settings=FLOAT64) as unit:
        compare(unit, name, "omat")
    assert cli.main(["info", output]) == 0
    shown = capsys.readouterr().out
    for row in [rf"converted_from.file +│ {name}.pt", r"converted_from.task +│ omat", r"data sets +│ omat"]:
        assert re.search(row, shown), row
    assert ("UMA-S-1.2" in shown) == (name == "uma")


def test_a_deepmd_file_gives_the_reference_values(tmp_path):
    path = write(tmp_path / "model.ckpt-1000.pt", {"Default": model("dpa3_fixed")})
    unit = PredictUnit.from_upstream(path, device="cpu", settings=FLOAT64)
    for system in ("cuag32_triclinic", "cluster22_nopbc"):
        found, expected = unit.predict(atoms_of(system)), golden("dpa3_fixed")[2]
        assert abs(found.energy.item() - expected[f"{system}/energy"].item()) < 1e-8
        assert abs(found.forces.numpy() - expected[f"{system}/force"]).max() < 1e-9


def test_a_head_of_a_deepmd_file_is_chosen_and_written(tmp_path):
    heads = {"Water": model("dpa3_fixed"), "Alloy": model("dpa3_fixed")}
    heads["Alloy"][1]["atomic_model.out_bias"] += 1.0
    path = write(tmp_path / "model.pt", heads, multi_task=True)
    assert cli.main(["convert", str(path), str(tmp_path / "a.safetensors"), "--head", "Alloy"]) == 0
    potential, info = load_checkpoint(tmp_path / "a.safetensors")
    assert info.extra["converted_from"]["head"] == "Alloy"
    other, _ = load_upstream(path, head="Water")
    z = list(potential.elements)
    torch.testing.assert_close(potential.element_energies[z], other.element_energies[z] + 1.0)
    with pytest.raises(ValueError, match="choose one with head="):
        load_upstream(path)


def test_arguments_of_the_other_package_are_refused(tmp_path):
    path = write(tmp_path / "model.pt", {"Default": model("dpa3_fixed")})
    with pytest.raises(ValueError, match="task='omat' is for fairchem"):
        load_upstream(path, task="omat")
    with pytest.raises(ValueError, match="head='Water' is for deepmd-kit"):
        load_upstream(FILES / "uma.pt", head="Water")


class Command:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("where", ["alone", "in the options"])
def test_a_pickle_that_runs_a_command_is_refused_by_name(where, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "model.pt"
    command: Any = Command(marker)
    state = OrderedDict(_extra_state={"model_params": {"type_map": command}})
    torch.save(command if where == "alone" else {"model": state}, path)
    with pytest.raises(ValueError, match=r"model\.pt was not loaded: it asks for (posix|nt)\.system"):
        load_upstream(path)
    path.write_bytes(pickle.dumps(command))
    with pytest.raises(ValueError, match="not an archive that torch.save wrote"):
        load_upstream(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(command))  # negative control: the file would have done it
    assert marker.exists()


def test_all_unknown_classes_are_named(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"model": Path("a"), "settings": FLOAT64}, path)
    with pytest.raises(ValueError, match=r"asks for gnnmd\.predict\.settings\.InferenceSettings, pathlib"):
        load_upstream(path)


def test_a_reference_in_the_options_calls_no_function(monkeypatch):
    """omegaconf would look up the environment, or call what another package registered."""
    monkeypatch.setenv("GNNMD_SECRET", "found")
    config = OmegaConf.create(
        {"x": {"y": 3}, "model": {"a": "${x.y}", "b": "${oc.env:GNNMD_SECRET}", "c": ["${x}"]}}
    )
    assert _plain({"model": config.model}) == {
        "model": {"a": 3, "b": "${oc.env:GNNMD_SECRET}", "c": [{"y": 3}]}
    }
    with pytest.raises(ValueError, match=r"refers to \$\{x.z\}, which is not in the file"):
        _plain(OmegaConf.create({"x": {}, "a": "${x.z}"}))


@pytest.mark.parametrize("part", [0.99, 0.5, 0.01])
def test_a_truncated_file_is_named(part, tmp_path):
    content = (FILES / "uma.pt").read_bytes()
    (tmp_path / "uma.pt").write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match=r"uma\.pt is truncated or damaged"):
        load_upstream(tmp_path / "uma.pt")


def test_a_damaged_pickle_is_named(tmp_path):
    """The archive is whole, but what it holds is cut."""
    with zipfile.ZipFile(FILES / "uma.pt") as old, zipfile.ZipFile(tmp_path / "uma.pt", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content[:5000] if name.endswith("data.pkl") else content)
    with pytest.raises(ValueError, match=r"uma\.pt is damaged, or no file that torch\.save wrote"):
        load_upstream(tmp_path / "uma.pt")


def test_a_flipped_bit_in_a_weight_is_found(tmp_path):
    content = bytearray((FILES / "uma.pt").read_bytes())
    with zipfile.ZipFile(FILES / "uma.pt") as archive:
        largest = max((i for i in archive.infolist() if "/data/" in i.filename), key=lambda i: i.file_size)
    content[largest.header_offset + 1000] ^= 1
    (tmp_path / "uma.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"uma\.pt is truncated or damaged .wrong checksum of .*/data/"):
        load_upstream(tmp_path / "uma.pt", task="omat")


def frozen(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def compiled(path: Path) -> None:
    exported = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(exported, path)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        (
            "graph.pb",
            lambda path: path.write_bytes(b"\x0a\x1fabc"),
            "is a frozen TensorFlow graph.*model.ckpt",
        ),
        ("a.safetensors", lambda path: path.write_bytes(b"\x08" * 9), "load it with PredictUnit"),
        ("frozen.pth", frozen, r"frozen TorchScript model \(.pth\).*the checkpoint it was made from"),
        ("model.pt2", compiled, r"compiled model \(.pt2\).*the checkpoint it was made from"),
        (
            "a.pt",
            lambda path: torch.save({"weights": torch.zeros(3)}, path),
            "no model that is known.*fairchem",
        ),
        ("a.pt", lambda path: torch.save([1, 2], path), "no model that is known"),
        ("a.pt", lambda path: torch.save({"model": 3}, path), "no model that is known"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_another_format_is_told_what_to_give_instead(name, make, message, tmp_path):
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        load_upstream(tmp_path / name)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load_upstream(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_upstream(tmp_path / "uma.pt")


def test_options_that_refer_to_themselves_are_refused():
    checkpoint = _FairchemCheckpoint()
    checkpoint.model_config = OmegaConf.create({"a": "${b}", "b": "${a}"})
    with pytest.raises(ValueError, match="options of model_config refer to themselves"):
        _field(checkpoint, "model_config")
