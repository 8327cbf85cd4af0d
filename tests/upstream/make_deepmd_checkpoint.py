"""Training checkpoints in the layout of deepmd-kit 3's PyTorch backend, with weights of tests/golden/deepmd.

Needs torch only, not deepmd-kit, whose own files are in tests/golden/deepmd_files (`make_deepmd_files.py`).

    python make_deepmd_checkpoint.py dpa3_fixed model.ckpt.pt
"""

import argparse
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "deepmd"


def model(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the model section and the weights, with statistics for every neighbour and equal aliases."""
    section = json.loads((GOLDEN / f"{name}.config.json").read_text())
    state = {}
    for key, array in np.load(GOLDEN / f"{name}.weights.npz").items():
        x = torch.tensor(array)
        if key.endswith("[:,0]"):
            key, x = key.removesuffix("[:,0]"), x[:, None].repeat(1, 120, 1)
        state[key] = x
    for key in state:
        if "._networks.0." in key:
            state[key.replace("._networks.0.", ".networks.0.")] = state[key]
    return section, state


def write(
    path: Path, heads: dict[str, tuple[dict[str, Any], dict[str, Tensor]]], *, multi_task: bool = False
) -> Path:
    """Write the models as the trainer writes them; the head of single-task training is "Default"."""
    state: OrderedDict[str, Any] = OrderedDict()
    for head, (_, weights) in heads.items():
        state |= {f"model.{head}.{key}": x for key, x in weights.items()}
    sections = {head: section for head, (section, _) in heads.items()}
    params = {"model_dict": sections} if multi_task else dict(sections["Default"])
    params["resuming"] = False
    state["_extra_state"] = {"model_params": params, "train_infos": {"lr": 1e-5, "step": 1000}}
    optimizer = {"state": {0: {"step": torch.tensor(1000.0)}}, "param_groups": [{"lr": 1e-5, "params": [0]}]}
    torch.save({"model": state, "optimizer": optimizer}, path)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="for instance dpa3_fixed")
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    write(args.output, {"Default": model(args.name)})
