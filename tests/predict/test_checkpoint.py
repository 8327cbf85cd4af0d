import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import bulk
from safetensors.torch import load_file, save_file

from gnnmd.models.build import PotentialConfig, build_potential, to_dict
from gnnmd.models.escn_md import EscnMDConfig
from gnnmd.models.potential import Potential
from gnnmd.predict import (
    InferenceSettings,
    PredictUnit,
    load_checkpoint,
    read_info,
    save_checkpoint,
)
from gnnmd.predict.checkpoint import FORMAT, write_atomically
from tests.lennard_jones import lennard_jones

CONFIG = PotentialConfig(
    EscnMDConfig(
        channels=8, hidden_channels=8, edge_channels=8, num_basis=8, lmax=1, mmax=1, num_layers=1, r_cut=4.0
    ),
    datasets=("emt", "pbe"),
    elements=(29, 47),
)
STATISTICS = {"element_energies": np.arange(119) / 7, "force_rms": torch.tensor(0.5)}
EXTRA = {"test_errors": {"forces_mae": 0.0401, "energy_mae": float("nan")}, "data": Path("silver.extxyz")}


def potential(seed: int = 0) -> Potential:
    torch.manual_seed(seed)
    built = build_potential(CONFIG)
    built.element_energies[47] = -2.7182818284590452
    built.energy_scale.fill_(1 / 3)
    return built


def saved(folder: Path, model: Potential | None = None) -> Path:
    return save_checkpoint(folder / "a.safetensors", model or potential(), to_dict(CONFIG), STATISTICS, EXTRA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_keeps_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = potential().to(dtype)
    loaded, info = load_checkpoint(saved(tmp_path, model))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert (loaded.datasets, loaded.elements, loaded.r_cut) == (("emt", "pbe"), (29, 47), 4.0)
    settings = InferenceSettings(dtype=dtype)
    atoms = bulk("Ag", cubic=True)
    atoms.rattle(0.1, seed=0)
    atoms.info["dataset"] = "pbe"
    unit = PredictUnit.from_checkpoint(tmp_path / "a.safetensors", device="cpu", settings=settings)
    expected = PredictUnit(model, device="cpu", settings=settings).predict(atoms)
    assert torch.equal(unit.predict(atoms).energy, expected.energy)
    assert torch.equal(unit.predict(atoms).forces, expected.forces)
    assert unit.info == info


def test_description_says_what_is_inside(tmp_path: Path) -> None:
    info = read_info(saved(tmp_path))
    assert info == load_checkpoint(tmp_path / "a.safetensors")[1]
    assert info.format == FORMAT
    assert info.config["model"]["channels"] == 8
    assert info.n_parameters == sum(p.numel() for p in potential().parameters())
    assert (info.dtype, info.r_cut, info.elements, info.datasets) == (
        "float32",
        4.0,
        (29, 47),
        ("emt", "pbe"),
    )
    assert info.statistics["element_energies"] == (np.arange(119) / 7).tolist()
    assert info.extra["test_errors"]["forces_mae"] == 0.0401
    assert info.extra["data"] == "silver.extxyz"


def test_equal_models_make_equal_files(tmp_path: Path) -> None:
    files = [save_checkpoint(tmp_path / f"{k}.safetensors", potential(), extra=EXTRA) for k in range(3)]
    assert len({file.read_bytes() for file in files}) == 1
    assert read_info(files[0]).config == json.loads(json.dumps(to_dict(CONFIG)))


def test_layers_that_share_a_weight_are_kept(tmp_path: Path) -> None:
    model = potential()
    layers = model.heads["energy"].layers
    layers[1].weight = layers[0].weight
    loaded, _ = load_checkpoint(saved(tmp_path, model))
    assert torch.equal(loaded.heads["energy"].layers[1].weight, layers[0].weight)


def test_saving_and_loading_leave_model_and_random_numbers_alone(tmp_path: Path) -> None:
    model = potential().train()
    state = torch.get_rng_state()
    loaded, _ = load_checkpoint(saved(tmp_path, model))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert loaded.state_dict()["element_energies"].data_ptr() != model.element_energies.data_ptr()


def test_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path, potential(seed=1))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_file_is_replaced_after_its_content_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, move = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda d: done.append(f"sync {os.fstat(d).st_size}") or fsync(d))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("replace") or move(a, b))
    write_atomically(tmp_path / "new folder" / "x", b"12345")
    assert done == ["sync 5", "replace"]
    assert (tmp_path / "new folder" / "x").read_bytes() == b"12345"


def test_a_diverged_model_is_not_written(tmp_path: Path) -> None:
    model = potential()
    next(model.parameters()).data.flatten()[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite weights in"):
        saved(tmp_path, model)
    assert not list(tmp_path.iterdir())


def test_values_that_json_cannot_hold_are_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not function .*lambda"):
        save_checkpoint(tmp_path / "a.safetensors", potential(), extra={"f": lambda: 0})
    with pytest.raises(ValueError, match="end in .safetensors"):
        save_checkpoint(tmp_path / "a.pt", potential())
    with pytest.raises(ValueError, match="it has no configuration; pass config"):
        save_checkpoint(tmp_path / "a.safetensors", lennard_jones())


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_refused_unopened(tmp_path: Path, name: str, zipped: bool) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save(Bomb(), tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=rf"{name} is a pickle .* does not load it. Use the .safetensors file"
    ):
        load_checkpoint(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, -1])
def test_a_truncated_file_is_reported(tmp_path: Path, kept: float) -> None:
    path = saved(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        load_checkpoint(path)


def test_no_length_of_the_description_makes_a_file_look_like_a_pickle(tmp_path: Path) -> None:
    path, firsts = tmp_path / "a.safetensors", set()
    for n in range(0, 256, 8):  # the file begins with the length of its header, a multiple of 8
        save_checkpoint(path, potential(), extra={"note": "x" * n})
        firsts.add(path.read_bytes()[0])
        assert read_info(path).extra["note"] == "x" * n
    assert 0x80 in firsts  # as a pickle begins


def test_a_flipped_bit_is_reported(tmp_path: Path) -> None:
    path = saved(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged: its weights do not match their checksum"):
        load_checkpoint(path)


def rewritten(path: Path, change: dict[str, object], weights: dict[str, torch.Tensor] | None = None) -> Path:
    """Write the file again with a changed description, as another program would."""
    info = json.loads(header(path)["__metadata__"]["gnnmd"]) | change
    save_file(weights or load_file(path), path, {"gnnmd": json.dumps(info)})
    return path


def header(path: Path) -> dict[str, dict[str, str]]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])


def test_files_of_later_or_other_programs_are_reported(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=f"format 99, written by gnnmd 7.0.0; gnnmd .* up to format {FORMAT}. Upgrade"
    ):
        load_checkpoint(rewritten(saved(tmp_path), {"format": 99, "gnnmd": "7.0.0"}))
    with pytest.raises(ValueError, match="damaged description .*unexpected keyword argument 'colour'"):
        load_checkpoint(rewritten(saved(tmp_path), {"colour": "red"}))
    save_file({"x": torch.zeros(3)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="was not written by gnnmd"):
        load_checkpoint(tmp_path / "b.safetensors")


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "dtype"])
def test_weights_that_do_not_fit_their_configuration_are_named(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path)
    weights = load_file(path)
    name = "heads.energy.layers.0.weight"
    assert name in weights
    if fault == "missing":
        del weights[name]
    elif fault == "unexpected":
        weights["heads.energy.extra"] = torch.zeros(2)
    elif fault == "shape":
        weights[name] = weights[name][:-1].clone()
    else:
        weights[name] = weights[name].double()
    monkeypatch.setattr("gnnmd.predict.checkpoint.checksum", lambda weights: 0)
    found = {
        "missing": f"missing {name}",
        "unexpected": "unexpected heads.energy.extra",
        "shape": rf"{name} is \[7, 8\] torch.float32, not \[8, 8\]",
        "dtype": f"{name} is .* torch.float64, not .* torch.float32",
    }
    with pytest.raises(ValueError, match=f"does not fit the model.*{found[fault]}"):
        load_checkpoint(rewritten(path, {"checksum": 0}, weights))


def test_names_of_packaged_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = tmp_path / "pretrained"
    monkeypatch.setattr("gnnmd.predict.checkpoint._PRETRAINED", packaged)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 'silver'.*comes with gnnmd \(none\)"):
        load_checkpoint("silver")
    save_checkpoint(packaged / "silver.safetensors", potential())
    assert load_checkpoint("silver")[1].elements == (29, 47)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 'sliver'.*\(silver\)"):
        load_checkpoint("sliver")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "silver").mkdir()  # a folder of that name does not hide it
    assert load_checkpoint("silver")[1].elements == (29, 47)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load_checkpoint(tmp_path)
