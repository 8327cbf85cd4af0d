#!/usr/bin/env python
"""Time deepmd-kit's DPA-3 on the CPU (PyTorch backend, pure Python): energy and forces, float32.

Weights are random. Runs in an environment of its own with ``deepmd-kit`` (checked with 3.2.0, without its
compiled operators), e3nn and ase; gnnmd is not imported.

    python deepmd_cpu.py                                  # 108 and 256 silver, 192 water atoms, 2 threads
    python deepmd_cpu.py --jit --atoms silver:108         # through torch.jit.script, as its DeepPot does

Each size runs in a process of its own and prints one JSON line. A call is ``model(coord, atype, box)``: its
own neighbour list, energy, forces and virial, which it always computes. ``sel`` is 120 and 30 without
truncation, so that it pads as little as possible; normalisation is that of the published example.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from protocol import STRUCTURES, cpu_name, in_processes, jittered, milliseconds, rss_mib


def parse_args(argv=None):
    """Read the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--atoms", nargs="+", default=["silver:108", "silver:256", "water:192"])
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--layers", type=int, default=6)
    p.add_argument("--warmup", type=int, default=3)
    p.add_argument("--iters", type=int, default=10)
    p.add_argument("--jit", action="store_true", help="torch.jit.script the model")
    return p.parse_args(argv)


def build_model(args, symbols):
    """Return the model in float32, as its evaluation has it."""
    import torch
    from deepmd.pt.model.model import get_model

    repflow = {"n_dim": 128, "e_dim": 64, "a_dim": 32, "nlayers": args.layers, "axis_neuron": 4}
    repflow |= {
        "e_rcut": 6.0,
        "e_rcut_smth": 5.3,
        "e_sel": 120,
        "a_rcut": 4.0,
        "a_rcut_smth": 3.5,
        "a_sel": 30,
    }
    repflow |= {"a_compress_rate": 1, "a_compress_e_rate": 2, "a_compress_use_split": True}
    repflow |= {"smooth_edge_update": True, "edge_init_use_dist": True, "use_exp_switch": True}
    repflow |= {"use_dynamic_sel": True, "sel_reduce_factor": 1.0}
    act = {"activation_function": "silut:10.0", "precision": "float32", "seed": 1}
    torch.manual_seed(0)
    model = get_model(
        {
            "type_map": symbols,
            "descriptor": {"type": "dpa3", "repflow": repflow, **act},
            "fitting_net": {"neuron": [240, 240, 240], "resnet_dt": True, **act},
        }
    )
    model = model.eval().requires_grad_(False)
    return torch.jit.script(model) if args.jit else model


def measure(args, size):
    """Time one size in this process and return the record that is printed."""
    os.environ.setdefault("DP_INTRA_OP_PARALLELISM_THREADS", str(args.threads))
    os.environ.setdefault("DP_INTER_OP_PARALLELISM_THREADS", "1")
    os.environ["DEVICE"] = "cpu"
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from importlib.metadata import version

    import torch

    name, _, n_atoms = size.partition(":")
    atoms = STRUCTURES[name](int(n_atoms))
    symbols = sorted(set(atoms.get_chemical_symbols()))
    model = build_model(args, symbols)
    torch.set_num_threads(args.threads)
    types = torch.tensor([[symbols.index(s) for s in atoms.get_chemical_symbols()]])
    box, frames, out = torch.tensor(atoms.cell.array).reshape(1, 9), jittered(atoms), {}

    def energy_and_forces(_):
        out.update(model(torch.tensor(next(frames).positions)[None], types, box))

    base = rss_mib()
    times = milliseconds(energy_and_forces, args.warmup, args.iters)
    return {
        "impl": f"deepmd-kit {version('deepmd-kit')}",
        "size": size,
        "jit": args.jit,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "ms_median": round(statistics.median(times), 2),
        "ms_min": round(min(times), 2),
        "peak_rss_mib": round(rss_mib(), 1),
        "base_rss_mib": round(base, 1),
        "energy_per_atom": float(out["energy"].sum()) / len(atoms),
        "torch": torch.__version__,
        "cpu": cpu_name(),
    }


def main():
    """Measure every size, each in its own process."""
    args = parse_args()
    if len(args.atoms) == 1:
        print(json.dumps(measure(args, args.atoms[0])), flush=True)
        return 0
    rest = [f"--{name}={getattr(args, name)}" for name in ("threads", "layers", "warmup", "iters")]
    return in_processes([os.path.abspath(__file__)], args.atoms, rest + ["--jit"] * args.jit, args.threads)


if __name__ == "__main__":
    sys.exit(main())
