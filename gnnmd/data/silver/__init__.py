"""Built-in data set: warm silver, solid and liquid, labelled by ASE's EMT; README.md says how it was made."""

from pathlib import Path

from ase import Atoms

from gnnmd.data.readers import read_frames

SPLITS = ("train", "val", "test")


def silver_file(split: str) -> Path:
    """Return the path of the compressed extxyz file of ``split``, "train", "val" or "test"."""
    if split not in SPLITS:
        raise ValueError(f"silver has no split {split!r}; choose one of {', '.join(SPLITS)}")
    return Path(__file__).parent / f"{split}.extxyz.xz"


def load_silver(split: str) -> list[Atoms]:
    """Return the frames of ``split``: 270 of "train", 30 of "val", 60 of "test", all three labels."""
    return read_frames(silver_file(split), labelled=True)
