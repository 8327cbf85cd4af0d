from pathlib import Path
from typing import Any

import pytest
import torch
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from gnnmd.data.datamodule import AtomsDataModule, DataConfig
from gnnmd.graph import AtomBatch, neighbor_list

R_CUT = 3.5


def write_crystals(path: Path, n: int, first: int = 0) -> str:
    """Crystals of two sizes whose energy is their number."""
    frames = []
    for k in range(first, first + n):
        atoms = bulk("Ag", cubic=True) * (1, 1, 1 + k % 2)
        atoms.rattle(0.05, seed=k)
        atoms.calc = SinglePointCalculator(atoms, energy=float(k), forces=atoms.positions)
        frames.append(atoms)
    write(path, frames)
    return str(path)


def ready(r_cut: float = R_CUT, **config: Any) -> AtomsDataModule:
    module = AtomsDataModule(DataConfig(**config), r_cut)
    module.setup()
    return module


def energies(dataset: Any) -> list[float]:
    return [e.item() for e in dataset.labels("energy")]


def test_silver_needs_no_settings_and_has_its_own_splits() -> None:
    module = ready()
    assert module.test_set is not None
    assert [len(s) for s in (module.train_set, module.val_set, module.test_set)] == [270, 30, 60]
    assert module.statistics.elements == (47,)
    assert len(module.train_dataloader()) == 68


def test_loaders_hand_out_batches_with_their_neighbour_lists(tmp_path: Path) -> None:
    module = ready(
        train=write_crystals(tmp_path / "a.extxyz", 10), val_split=3, max_atoms=16, max_frames=None
    )
    seen = []
    for batch in module.train_dataloader():
        atoms = AtomBatch.from_data(batch)
        expected = neighbor_list(atoms, R_CUT)
        assert torch.equal(batch.edge_index, expected.edge_index)
        assert torch.equal(batch.shift, expected.shift)
        assert len(atoms.numbers) <= 16
        assert atoms.stress.isnan().all()
        seen += atoms.energy.tolist()
    assert sorted(seen) == energies(module.train_set)
    assert [e for b in module.val_dataloader() for e in b.energy.tolist()] == energies(module.val_set)


@pytest.mark.parametrize(
    ("val", "test", "sizes"), [(0.2, 0.1, (14, 4, 2)), (5, 0, (15, 5, 0)), (0.01, 3, (16, 1, 3))]
)
def test_one_file_is_split_without_overlap_and_reproducibly(
    tmp_path: Path, val: float, test: float, sizes: tuple[int, int, int]
) -> None:
    config = {"train": write_crystals(tmp_path / "a.extxyz", 20), "val_split": val, "test_split": test}
    module, again, other = ready(**config), ready(**config), ready(**config, split_seed=1)
    parts = [module.train_set, module.val_set, module.test_set]
    assert tuple(len(part) if part else 0 for part in parts) == sizes
    assert sorted(e for part in parts if part for e in energies(part)) == list(range(20))
    assert energies(again.val_set) == energies(module.val_set)
    assert energies(other.train_set) != energies(module.train_set)


def test_named_files_are_used_whole(tmp_path: Path) -> None:
    train, val = write_crystals(tmp_path / "a.extxyz", 4), write_crystals(tmp_path / "b.extxyz", 3, first=4)
    module = ready(train=[train, train], val=val, test=f"{val}@:1")
    assert energies(module.train_set) == [0, 1, 2, 3] * 2
    assert energies(module.val_set) == [4, 5, 6]
    assert module.test_set is not None
    assert energies(module.test_set) == [4]


def test_a_molecule_set_trains_without_cell_or_stress(tmp_path: Path) -> None:
    frames = []
    for k, name in enumerate(["H2O", "CH4", "NH3", "H2"]):
        atoms = molecule(name)
        atoms.info.update(U0=-10.0 - k, charge=0)
        atoms.arrays["grad"] = atoms.positions * 0
        frames.append(atoms)
    write(tmp_path / "a.extxyz", frames)
    module = ready(
        train=str(tmp_path / "a.extxyz"), energy_key="U0", forces_key="grad", dataset="qm9", val_split=1
    )
    (batch,) = module.train_dataloader()
    assert not batch.pbc.any()
    assert batch.stress.isnan().all()
    assert batch.dataset == ["qm9"] * 3
    assert module.statistics.n_forces == module.statistics.n_atoms


def test_replicas_share_the_batches(tmp_path: Path) -> None:
    config = DataConfig(train=write_crystals(tmp_path / "a.extxyz", 11), val_split=1, max_frames=2)
    seen, lengths = [], set()
    for rank in range(2):
        module = AtomsDataModule(config, R_CUT, num_replicas=2, rank=rank)
        module.setup()
        loader = module.train_dataloader()
        lengths.add(len(loader))
        seen += [e for batch in loader for e in batch.energy.tolist()]
    assert len(lengths) == 1
    assert sorted(seen) == energies(module.train_set)


def test_ranks_that_share_graphs_list_edges_only_to_bound_batches(tmp_path: Path) -> None:
    train = write_crystals(tmp_path / "a.extxyz", 5)
    for max_edges, counted in ((None, False), (1000, True)):
        config = DataConfig(train=train, val_split=1, max_edges=max_edges)
        module = AtomsDataModule(config, R_CUT, share_graphs=True)
        module.setup()
        assert (module.train_set.n_edges is not None) is counted
        assert (module.statistics.to_dict()["mean_edges"] is not None) is counted
        assert "edge_index" not in next(iter(module.train_dataloader()))


def test_splits_that_leave_nothing_are_refused(tmp_path: Path) -> None:
    train = write_crystals(tmp_path / "a.extxyz", 4)
    for options in ({"val_split": 0}, {"val_split": 4}, {"val_split": 2, "test_split": 2}):
        with pytest.raises(ValueError, match="4 frames split into .* change data.val_split"):
            ready(train=train, **options)
    with pytest.raises(ValueError, match=r"a split of 1.5 is neither a fraction"):
        ready(train=train, val_split=1.5)
    with pytest.raises(ValueError, match=r"data\.train is not set; name the training files"):
        ready(train=None)
    with pytest.raises(ValueError, match=r"there is no test set; name data\.test"):
        ready(train=train).test_dataloader()


def test_frames_without_labels_are_refused_for_training(tmp_path: Path) -> None:
    write(tmp_path / "a.extxyz", [molecule("H2O")] * 3)
    with pytest.raises(ValueError, match=r"a\.extxyz, frame 0: there are no labels"):
        ready(train=str(tmp_path / "a.extxyz"))


def test_the_loader_leaves_the_global_random_stream_alone(tmp_path: Path) -> None:
    loader = ready(train=write_crystals(tmp_path / "a.extxyz", 4), val_split=1).train_dataloader()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_worker_processes_hand_out_the_same_batches(tmp_path: Path) -> None:
    config = {"train": write_crystals(tmp_path / "a.extxyz", 6), "val_split": 1, "max_frames": 2}
    here, there = ready(**config).train_dataloader(), ready(**config, num_workers=1).train_dataloader()
    iterator = iter(there)
    next(iterator)
    assert there.state_dict() == {"epoch": 0, "position": 1}  # though the worker is ahead
    assert [b.energy.tolist() for b in there] == [b.energy.tolist() for b in here]


class Recorder(LightningModule):
    """Learns nothing and remembers the energies of its batches."""

    def __init__(self, save_at: int | None = None, checkpoint: Path = Path()):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.save_at, self.checkpoint = save_at, checkpoint
        self.batches: list[tuple[int, tuple[float, ...]]] = []
        self.validations = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches.append((self.current_epoch, tuple(batch.energy.tolist())))
        return self.weight * batch.energy.sum()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if len(self.batches) == self.save_at:
            self.trainer.save_checkpoint(self.checkpoint)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validations += len(batch.energy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(root: Path, epochs: int) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        default_root_dir=root,
    )


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
def test_lightning_sees_every_frame_in_every_epoch_and_resumes_inside_one(tmp_path: Path) -> None:
    config = {
        "train": write_crystals(tmp_path / "a.extxyz", 17),
        "val_split": 3,
        "max_atoms": 16,
        "max_frames": None,
    }

    def module() -> AtomsDataModule:
        return AtomsDataModule(DataConfig(**config), R_CUT, seed=5)

    whole = Recorder()
    trainer(tmp_path, 3).fit(whole, datamodule=module())
    for epoch in range(3):
        seen = [e for at, batch in whole.batches if at == epoch for e in batch]
        assert len(seen) == len(set(seen)) == 14
    assert whole.batches[0][1] != whole.batches[len(whole.batches) // 3][1]
    # the sanity check sees one batch, every epoch all of them
    n_first = len(next(iter(ready(**config).val_dataloader())).energy)
    assert whole.validations == 3 * 3 + n_first

    per_epoch = len(whole.batches) // 3
    for save_at in (per_epoch + 2, 2 * per_epoch):  # inside the second epoch and after its last batch
        first, second = Recorder(save_at, tmp_path / "half.ckpt"), Recorder()
        trainer(tmp_path, 3).fit(first, datamodule=module())
        trainer(tmp_path, 3).fit(
            second, datamodule=module(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
        )
        assert first.batches[:save_at] + second.batches == whole.batches


def test_frames_keep_their_source_through_a_random_split(tmp_path: Path) -> None:
    files = [write_crystals(tmp_path / "a.extxyz", 10), write_crystals(tmp_path / "b.extxyz", 10, first=10)]
    module = ready(train=files, val_split=8)
    for loader in (module.train_dataloader(), module.val_dataloader()):
        assert set(loader.dataset.sources) == {"a.extxyz", "b.extxyz"}
        for batch in loader:
            found = [loader.dataset.sources[s] for s in batch.source.tolist()]
            assert found == ["ab"[energy >= 10] + ".extxyz" for energy in batch.energy.tolist()]
