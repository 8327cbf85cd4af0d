"""Checkpoints, prediction on one device, errors and parity plots."""

from gnnmd.models.potential import Prediction
from gnnmd.predict.checkpoint import CheckpointInfo, load_checkpoint, read_info, save_checkpoint
from gnnmd.predict.settings import InferenceSettings
from gnnmd.predict.unit import PredictUnit

__all__ = [
    "CheckpointInfo",
    "InferenceSettings",
    "PredictUnit",
    "Prediction",
    "load_checkpoint",
    "read_info",
    "save_checkpoint",
]
