"""Readers, the built-in data set, statistics and loaders (`dataset`, `sampler`, `datamodule`)."""

from gnnmd.data.readers import read_frames
from gnnmd.data.silver import load_silver

__all__ = ["load_silver", "read_frames"]
