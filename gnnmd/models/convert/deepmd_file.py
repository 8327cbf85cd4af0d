"""Potentials from what is in deepmd-kit's PyTorch training checkpoints (facts: deepmd-kit 3.2.0).

Such a file holds a state dict, keys "model.<head>.atomic_model. ...", and under "_extra_state" the options of
the model, or in multi-task training those of each head under "model_dict". The only head of single-task
training is called "Default".
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gnnmd.models.convert import deepmd
from gnnmd.models.potential import Potential

#: Entries of how the training was started, and other names of a head; the trained function is the same.
_NO_EFFECT = ("resuming", "finetune_head", "model_branch_alias")


def build(state: Mapping[str, Any], head: str | None) -> tuple[Potential, dict[str, str]]:
    """Return the potential of one head, in the precision of its weights, and what it was made from.

    Args:
        state: upstream's state dict with its "_extra_state".
        head: name of a head, or another name that the file gives it; None if the file has one only.

    Raises:
        ValueError: a head that the file does not have, or anything that is not known or not supported.
    """
    params = state["_extra_state"]["model_params"]
    sections = params.get("model_dict", {"Default": params})
    names = {name: name for name in sections}
    for name, section in sections.items():
        names |= dict.fromkeys(section.get("model_branch_alias", ()), name)
    if head is None and len(sections) > 1:
        raise ValueError(f"the file holds the heads {', '.join(sections)}; choose one with head=")
    if head is not None and head not in names:
        raise ValueError(f"head {head!r} is not in the file, which has {', '.join(names)}")
    name = names[head or next(iter(sections))]
    weights = {key: value for key, value in state.items() if key.startswith(f"model.{name}.")}
    options = {key: value for key, value in sections[name].items() if key not in _NO_EFFECT}
    if dim := options.get("fitting_net", {}).get("dim_case_embd", 0):
        options["fitting_net"] = options["fitting_net"] | {"dim_case_embd": 0}
        weights = _with_constant_case(weights, f"model.{name}.atomic_model.fitting_net.", dim)
    return deepmd.build(options, weights), {"head": name}


def _with_constant_case(weights: Mapping[str, Tensor], up: str, dim: int) -> dict[str, Tensor]:
    """Return weights of a fitting network without the vector c that tells it which head it is.

    It is constant for a head: [x, c] W + b = x W_x + (c W_c + b).

    Raises:
        ValueError: no such vector, or a first layer that adds its input or would without the vector.
    """
    state = dict(weights)
    case = state.pop(f"{up}case_embd", None)
    if case is None:
        raise ValueError(f"dim_case_embd={dim}, but there is no {up}case_embd")
    for key in [key for key in state if key.startswith(up) and key.endswith("networks.0.layers.0.matrix")]:
        matrix, bias = state[key], key.removesuffix("matrix") + "bias"
        n_in, n_out = matrix.shape
        if n_out in (n_in, 2 * n_in, n_in - dim, 2 * (n_in - dim)):
            raise ValueError(
                f"dim_case_embd={dim} with a first layer of {n_out} columns for {n_in} inputs is not "
                "supported: it adds its input"
            )
        state[key] = matrix[:-dim]
        state[bias] = state[bias] + case.to(matrix) @ matrix[-dim:]
    return state
