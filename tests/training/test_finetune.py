"""Runs that start from other weights: what they keep, freeze, restrict and refit."""

from dataclasses import replace
from pathlib import Path

import ase.io
import pytest
import torch
from ase.build import bulk, molecule
from ase.data import atomic_numbers

from gnnmd import cli
from gnnmd.config import load_config
from gnnmd.data.datamodule import DataConfig
from gnnmd.graph import AtomBatch
from gnnmd.models.build import PotentialConfig, build_potential, to_dict
from gnnmd.models.escn_md import EscnMDConfig
from gnnmd.nn.environment import Environment
from gnnmd.nn.type_embedding import TypeEmbedding
from gnnmd.predict import load_checkpoint, save_checkpoint
from gnnmd.training.callbacks import LAST, STATE
from gnnmd.training.finetune import start_from
from gnnmd.training.run import train
from gnnmd.training.settings import FinetuneConfig, ParallelConfig
from tests.models.systems import predict
from tests.training.conftest import alloys, crystals
from tests.training.interruptions import AtStep, ask_to_stop
from tests.training.jobs import fit
from tests.training.small_models import DPA2, DPA3
from tests.upstream.make_deepmd_checkpoint import model, write

FAIRCHEM = Path(__file__).parents[1] / "golden" / "fairchem_files"
SMALL = EscnMDConfig(
    r_cut=4.0, lmax=1, mmax=1, channels=8, hidden_channels=8, edge_channels=8, num_layers=1, num_basis=8
)
MODELS = pytest.mark.parametrize("shape", [SMALL, DPA3, DPA2], ids=lambda shape: shape.type)
ALLOY = (29, 47)


def knows_all(shape, path) -> Path:
    """Write a model with fresh weights for all 118 elements and a reference for each."""
    torch.manual_seed(0)
    potential = build_potential(PotentialConfig(replace(shape, type_map=()) if shape is not SMALL else shape))
    potential.element_energies[1:] = torch.arange(118.0, dtype=torch.float64)
    for environment in (m for m in potential.backbone.modules() if isinstance(m, Environment)):
        environment.std.uniform_(0.1, 0.3)
    return save_checkpoint(path, potential)


def tuned(config, source, data, **finetune):
    return replace(
        config,
        init_from=str(source),
        data=DataConfig(train=data, val_split=2, max_frames=2),
        finetune=FinetuneConfig(**finetune),
        trainer=replace(config.trainer, max_epochs=1),
    )


def unlike(before, after) -> set[str]:
    """Return the first two parts of the names of weights that differ."""
    old = before.state_dict()
    return {".".join(k.split(".")[:2]) for k, w in after.state_dict().items() if not torch.equal(w, old[k])}


@MODELS
@pytest.mark.parametrize("chunk", [None, 100])
def test_a_frozen_backbone_stays_to_the_last_bit(shape, chunk, config, frames, tmp_path, console):
    source = knows_all(shape, tmp_path / "all.safetensors")
    run = tuned(config, source, frames["alloy"], freeze_backbone=True, elements="all")
    run.trainer = replace(run.trainer, edge_chunk=chunk)
    result = train(run, console=console)
    before, after = load_checkpoint(source)[0], load_checkpoint(result.checkpoint)[0]
    assert unlike(before, after) == {"heads.energy", "element_energies"}
    assert "the backbone is frozen" in console.export_text()
    moved = after.element_energies != before.element_energies
    assert moved.nonzero().flatten().tolist() == list(ALLOY)


def test_an_unfrozen_backbone_moves(config, frames, tmp_path):
    """Negative control."""
    source = knows_all(SMALL, tmp_path / "all.safetensors")
    after = load_checkpoint(train(tuned(config, source, frames["alloy"])).checkpoint)[0]
    assert "backbone.blocks" in unlike(load_checkpoint(source)[0], after)


@MODELS
def test_a_subset_of_elements_is_the_same_function_on_it(shape, tmp_path):
    """Elements, references and tables agree; only references may say what others are."""
    old, info = load_checkpoint(knows_all(shape, tmp_path / "all.safetensors"))
    new, report = start_from(old, info, heads="conservative", datasets=(), elements=ALLOY)
    assert new.elements == new.config.elements == ALLOY
    assert new.element_energies.nonzero().flatten().tolist() == list(ALLOY)
    assert "for Cu, Ag only" in report
    if shape is not SMALL:
        assert new.backbone.config.type_map == ("Cu", "Ag")
        assert all(len(m.std) == 2 for m in new.backbone.modules() if isinstance(m, Environment))
    for atoms in (alloys(1)[0], crystals("Ag", 1)[0]):
        found, expected = predict(new.eval(), atoms), predict(old.eval(), atoms)
        torch.testing.assert_close(found.energy, expected.energy, rtol=0, atol=2e-6)
        torch.testing.assert_close(found.forces, expected.forces, rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="not trained on H, O; it knows Cu, Ag"):
        new.graph(AtomBatch.from_ase(molecule("H2O")))


@MODELS
def test_all_elements_may_be_kept(shape, config, frames, tmp_path, console):
    source = knows_all(shape, tmp_path / "all.safetensors")
    result = train(tuned(config, source, frames["alloy"], elements="all"), console=console)
    potential = load_checkpoint(result.checkpoint)[0]
    assert "116 elements are not in the data" in console.export_text()
    assert potential.element_energies[1:].count_nonzero() >= 117
    predict(potential, molecule("H2O"))


@MODELS
def test_what_was_restricted_is_trained_and_stored(shape, config, frames, tmp_path):
    source = knows_all(shape, tmp_path / "all.safetensors")
    potential, info = load_checkpoint(train(tuned(config, source, frames["alloy"])).checkpoint)
    assert potential.elements == info.elements == ALLOY
    with pytest.raises(ValueError, match="not trained on Au"):
        predict(potential, bulk("Au"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("O", "H", "Cu", "Ag"), ("Ag", "Cu")),
        (("O", "H", "Cu"), ("Cu", "O", "H", "Ag")),
        (("Cu", "H"), ("H", "Cu")),
    ],
)
@pytest.mark.parametrize("options", [{}, {"electron_configurations": True}, {"bias": True}], ids=str)
def test_embeddings_survive_another_number_of_types(before, after, options):
    """With eight columns four unit vectors have a skip, other numbers have none."""
    old, new = (TypeEmbedding([atomic_numbers[s] for s in map_], 8, **options) for map_ in (before, after))
    both = [s for s in after if s in before]
    new.copy_elements(old, [after.index(s) for s in both], [before.index(s) for s in both])
    numbers = torch.tensor([atomic_numbers[s] for s in both])
    torch.testing.assert_close(new(new.types(numbers)), old(old.types(numbers)), rtol=0, atol=1e-6)


@MODELS
def test_a_frozen_backbone_learns_no_new_elements(shape, config, frames, tmp_path):
    first = train(replace(config, model=shape, trainer=replace(config.trainer, max_epochs=1)))
    with pytest.raises(ValueError, match=r"freeze_backbone=true, but the backbone has to learn elements Ag"):
        train(tuned(config, first.folder, frames["alloy"], freeze_backbone=True))


def test_a_frozen_backbone_learns_no_new_data_set():
    torch.manual_seed(0)
    shape = replace(SMALL, dataset_embedding=True)
    old = build_potential(PotentialConfig(shape, datasets=("omat",)))
    info = type("Info", (), {"config": to_dict(old.config), "extra": {}})
    arguments = {"heads": "conservative", "datasets": ("omol",), "elements": ALLOY}
    assert start_from(old, info, **arguments)[0].datasets == ("omat", "omol")
    with pytest.raises(ValueError, match=r"has to learn backbone\.system_embedding\.dataset\.weight"):
        start_from(old, info, **arguments, settings=FinetuneConfig(freeze_backbone=True))


@MODELS
def test_frozen_and_restricted_on_two_ranks_as_on_one(shape, config, frames, tmp_path, pool):
    source = knows_all(shape, tmp_path / "all.safetensors")
    run = tuned(config, source, frames["alloy"], freeze_backbone=True)
    run.trainer = replace(run.trainer, precision="float64")
    one = pool.run(1, fit, run)[0]
    two = pool.run(2, fit, replace(run, parallel=ParallelConfig(gp=2)))[0]
    torch.testing.assert_close(two.average, one.average, rtol=1e-8, atol=1e-10)


def test_freezing_random_weights_is_refused(config):
    with pytest.raises(ValueError, match="set init_from"):
        replace(config, finetune=FinetuneConfig(freeze_backbone=True))


def test_a_frozen_run_is_resumed_with_what_it_had(config, frames, tmp_path):
    """Shape, elements and what is frozen come from the run folder; the weights it began from are not read."""
    source = knows_all(DPA3, tmp_path / "all.safetensors")
    begun = replace(tuned(config, source, frames["alloy"], freeze_backbone=True), name="frozen")
    begun.trainer = replace(begun.trainer, max_epochs=4)
    folder = train(begun, callbacks=[AtStep(2, ask_to_stop)]).folder
    source.unlink()
    again = load_config([f"resume={folder}", "trainer.progress=none"])
    assert again.init_from is None
    assert again.finetune.freeze_backbone
    before = load_checkpoint(folder / LAST)[0]
    (folder / LAST).unlink()  # as if it had been killed
    assert (folder / STATE).exists()
    after = load_checkpoint(train(again).checkpoint)[0]
    assert after.elements == ALLOY
    assert unlike(before, after) == {"heads.energy"}
    assert f"init_from: {source}" in (folder / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"finetune\.freeze_backbone=True"):
        train(load_config([f"resume={folder}", "finetune.freeze_backbone=false"]))


def converted(kind: str, folder: Path) -> Path:
    """Convert a checkpoint of fairchem-core or deepmd-kit by the command."""
    out = folder / "converted.safetensors"
    if kind in ("esen", "uma"):
        arguments = [str(FAIRCHEM / f"{kind}.pt"), str(out), "--task", "omat"]
    else:
        arguments = [str(write(folder / "model.pt", {"Default": model(kind)})), str(out)]
    assert cli.main(["convert", *arguments]) == 0
    return out


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "all"])
@pytest.mark.parametrize("kind", ["esen", "uma", "dpa3_fixed", "dpa2_tb"])
def test_converted_weights_are_fine_tuned(kind, frozen, config, tmp_path):
    """New references (labels are shifted by 100 eV per atom), new level of theory, a subset of elements."""
    source = converted(kind, tmp_path)
    images = alloys(4)
    for atoms in images:
        atoms.calc.results["energy"] += 100.0 * len(atoms)
    ase.io.write(tmp_path / "alloy.xyz", images)
    run = tuned(config, source, str(tmp_path / "alloy.xyz"), freeze_backbone=frozen)
    run.optim = replace(run.optim, lr=1e-5)
    result = train(run)
    potential, before = load_checkpoint(result.checkpoint)[0], load_checkpoint(source)[0]
    assert potential.elements == ALLOY
    assert potential.energy_scale == before.energy_scale
    assert result.errors["energy_mae"] < 5.0
    assert potential.config.model.type == before.config.model.type
    weights = dict(before.named_parameters())
    same = [
        torch.equal(w, weights[name].to(w.dtype))
        for name, w in potential.named_parameters()
        if name.startswith("backbone.blocks.0.")
    ]
    assert all(same) == frozen
