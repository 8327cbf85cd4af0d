"""Imported before fairchem-core: float64 everywhere, few threads, no log."""

import logging
import os
import warnings

import torch

os.environ.setdefault("WANDB_MODE", "disabled")
warnings.filterwarnings("ignore")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
torch.set_default_dtype(torch.float64)  # constant tables must be made in float64, not cast to it afterwards
logging.disable(logging.ERROR)
