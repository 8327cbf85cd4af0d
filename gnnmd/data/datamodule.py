"""Training, validation and test loaders from one description."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from ase import Atoms
from lightning.pytorch import LightningDataModule
from torch_geometric.data import Batch
from torch_geometric.loader import DataLoader

from gnnmd.data.dataset import AtomsDataset
from gnnmd.data.readers import read_sources
from gnnmd.data.sampler import AtomsBatchSampler
from gnnmd.data.silver import silver_file
from gnnmd.data.statistics import Statistics
from gnnmd.graph import LabelKeys

SILVER = "silver"


@dataclass
class DataConfig:
    """Where the frames are and how they are put into batches.

    Attributes:
        train: a path or pattern or a list of them (see `read_frames`), or "silver", the built-in set.
        val: likewise; None takes ``val_split`` from the training frames ("silver" has its own). Errors are
            also told for each entry of a list, see `read_sources`.
        test: likewise; None takes ``test_split`` from the training frames, after val.
        val_split: below 1 a fraction of the training frames, from 1 on a number of frames.
        test_split: likewise; 0 for none.
        split_seed: chooses the frames of the two splits. Frames of one trajectory resemble each other: a
            random split of them flatters the model, files of their own do not.
        energy_key: name of the energy (eV) in the files.
        forces_key: name of the forces (eV/A).
        stress_key: name of the stress (eV/A^3, positive = tension).
        virial_key: name of the virial (eV, -stress * volume), read where there is no stress.
        dataset: data set name (level of theory) of every frame; "" keeps what the files say.
        type_map: element of each type in DeePMD systems without type_map.raw.
        max_frames: most frames per batch; None for no such bound.
        max_atoms: most atoms per batch.
        max_edges: most edges per batch.
        num_workers: processes that collate batches; 0 collates in the training process.
    """

    train: Any = SILVER
    val: Any = None
    test: Any = None
    val_split: float = 0.1
    test_split: float = 0.0
    split_seed: int = 0
    energy_key: str = "energy"
    forces_key: str = "forces"
    stress_key: str = "stress"
    virial_key: str = "virial"
    dataset: str = ""
    type_map: list[str] | None = None
    max_frames: int | None = 4
    max_atoms: int | None = None
    max_edges: int | None = None
    num_workers: int = 0


class AtomsLoader(DataLoader):
    """A PyG loader that counts the batches it has handed out, so that a restart continues with the next one.

    Lightning stores ``state_dict`` in its checkpoints and restores it before the first batch.
    """

    def __init__(self, dataset: AtomsDataset, batch_sampler: AtomsBatchSampler, num_workers: int = 0):
        super().__init__(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Its own generator: a loader on the global one moves the random stream that dropout and others
            # draw from.
            generator=torch.Generator(),
        )
        self._handed_out = batch_sampler.state_dict()

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from the sampler's position on."""
        # A generator, so that nothing runs before the first batch is asked for: Lightning calls iter() before
        # it announces the epoch.
        self._handed_out = self.batch_sampler.state_dict()
        for batch in super().__iter__():
            self._handed_out["position"] += 1
            yield batch

    def repeats(self, batch_idx: int) -> bool:
        """Tell whether a batch only fills up, see `AtomsBatchSampler.repeats`."""
        return bool(self.batch_sampler.repeats(batch_idx))

    def state_dict(self) -> dict[str, int]:
        """Return epoch and number of batches handed out (not those that workers have prefetched)."""
        next_start = self.batch_sampler.state_dict()
        return dict(self._handed_out if self._handed_out["epoch"] == next_start["epoch"] else next_start)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the last batch handed out."""
        self.batch_sampler.load_state_dict(state)
        self._handed_out = dict(state)


class AtomsDataModule(LightningDataModule):
    """Reads the frames, splits them, builds their edges and hands out loaders.

    Attributes:
        config: the description.
        train_set, val_set, test_set: data sets after `setup`; ``test_set`` is None where there is none.
    """

    train_set: AtomsDataset
    val_set: AtomsDataset
    test_set: AtomsDataset | None

    def __init__(
        self,
        config: DataConfig,
        r_cut: float,
        *,
        max_neighbors: int | None = None,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        accumulate: int = 1,
        share_graphs: bool = False,
        progress: bool = True,
    ):
        """Remember the arguments; nothing is read before `setup`.

        Args:
            config: the description.
            r_cut: cutoff of the model, Angstrom.
            max_neighbors: of the model, see `neighbor_list`.
            seed: of the order of training frames.
            num_replicas: data-parallel replicas (not processes: ranks that share one graph read the same
                batches).
            rank: which replica this is.
            accumulate: training batches that a replica takes for one step.
            share_graphs: ranks share the graph of every batch and list its edges together: none are kept
                here.
            progress: show the progress of long preparations.
        """
        super().__init__()
        self.config, self.r_cut, self.max_neighbors, self.seed = config, r_cut, max_neighbors, seed
        self.num_replicas, self.rank, self.accumulate = num_replicas, rank, accumulate
        self.share_graphs, self.progress = share_graphs, progress

    def setup(self, stage: str | None = None) -> None:
        """Read, check and split the frames and build their edges, once.

        Raises:
            FileNotFoundError: a missing file.
            ValueError: no training files, a bad frame, or a split that leaves no frames to a part.
        """
        if hasattr(self, "train_set"):
            return
        config = self.config
        if not config.train:
            raise ValueError(
                "data.train is not set; name the training files, or choose the built-in set: silver"
            )
        train = self._read(config.train, "train")
        own_splits = config.train == SILVER
        val = self._read(SILVER if own_splits and config.val is None else config.val, "val")
        test = self._read(SILVER if own_splits and config.test is None else config.test, "test")
        n_val = 0 if val else _number(config.val_split, len(train))
        n_test = 0 if test else _number(config.test_split, len(train))
        if not val and not n_val or n_val + n_test >= len(train):
            raise ValueError(
                f"{len(train)} frames split into {n_val} for validation and {n_test} for testing leave "
                f"{max(0, len(train) - n_val - n_test)} for training. Both training and validation need "
                "frames: change data.val_split and data.test_split, or name data.val and data.test."
            )
        order = np.random.default_rng(config.split_seed).permutation(len(train))
        parts = [[train[i] for i in sorted(part)] for part in np.split(order, [n_val, n_val + n_test])]
        val, test = val or parts[0], test or parts[1]
        self.train_set = self._with_edges(parts[2])
        self.val_set = self._with_edges(val)
        self.test_set = self._with_edges(test) if test else None

    @cached_property
    def statistics(self) -> Statistics:
        """Statistics of the training set (after `setup`)."""
        return Statistics.from_dataset(self.train_set)

    def train_dataloader(self) -> AtomsLoader:
        """Return the shuffled loader of the training set."""
        return self._loader(self.train_set, shuffle=True, accumulate=self.accumulate)

    def val_dataloader(self) -> AtomsLoader:
        """Return the loader of the validation set, in the order of the frames."""
        return self._loader(self.val_set, shuffle=False)

    def test_dataloader(self) -> AtomsLoader:
        """Return the loader of the test set, in the order of the frames.

        Raises:
            ValueError: there is no test set.
        """
        if self.test_set is None:
            raise ValueError("there is no test set; name data.test, or set data.test_split above 0")
        return self._loader(self.test_set, shuffle=False)

    def _read(self, source: Any, split: str) -> list[tuple[Atoms, str]]:
        """Return frames and the data set of each."""
        if source is None:
            return []
        config = self.config
        keys = LabelKeys(config.energy_key, config.forces_key, config.stress_key, config.virial_key)
        if source == SILVER:
            source, keys = silver_file(split), LabelKeys()
        frames, sources = read_sources(
            source, keys=keys, dataset=config.dataset, type_map=config.type_map, labelled=True
        )
        return list(zip(frames, sources, strict=True))

    def _with_edges(self, named: list[tuple[Atoms, str]]) -> AtomsDataset:
        frames, sources = zip(*named, strict=True)
        counted: Literal["count", "skip"] = "skip" if self.config.max_edges is None else "count"
        edges = counted if self.share_graphs else "keep"
        return AtomsDataset(
            frames,
            self.r_cut,
            max_neighbors=self.max_neighbors,
            edges=edges,
            progress=self.progress,
            sources=sources,
        )

    def _loader(self, dataset: AtomsDataset, *, shuffle: bool, accumulate: int = 1) -> AtomsLoader:
        config = self.config
        sampler = AtomsBatchSampler(
            dataset.n_atoms,
            dataset.n_edges,
            max_frames=config.max_frames,
            max_atoms=config.max_atoms,
            max_edges=config.max_edges,
            shuffle=shuffle,
            seed=self.seed,
            num_replicas=self.num_replicas,
            rank=self.rank,
            accumulate=accumulate,
        )
        return AtomsLoader(dataset, sampler, config.num_workers)


def _number(split: float, n: int) -> int:
    """Frames of a split of ``n`` given as a fraction (at least one frame if above 0) or as a number."""
    if split < 0 or (split >= 1 and split != int(split)):
        raise ValueError(f"a split of {split} is neither a fraction from 0 to 1 nor a number of frames")
    return int(split) if split >= 1 else int(np.ceil(split * n))
