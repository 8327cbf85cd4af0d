#!/usr/bin/env python
"""Time fairchem's eSCN-MD on the CPU: energy and forces of rattled silver crystals, random weights.

Runs in an environment of its own with ``fairchem-core`` (checked with 2.24.0); gnnmd is not imported.

    python fairchem_cpu.py                       # 32, 108 and 256 atoms, 2 threads
    python fairchem_cpu.py --atoms 108 --threads 1 --channels 32

Each size runs in a process of its own, so that the peak memory belongs to it, and prints one JSON line:
``ms_median`` is the whole call (neighbour list, energy, forces), ``graph_ms_median`` the neighbour list
alone, ``peak_rss_mib`` the largest resident memory of the process and ``base_rss_mib`` its memory before the
first call.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from protocol import JITTER, cpu_name, in_processes, milliseconds, rss_mib, silver


def parse_args(argv=None):
    """Read the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--atoms", type=int, nargs="+", default=[32, 108, 256], help="4 n^3: 32, 108, 256, 500, ..."
    )
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--channels", type=int, default=64, help="sphere, hidden and edge channels")
    p.add_argument("--lmax", type=int, default=2)
    p.add_argument("--mmax", type=int, default=2)
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--num-basis", type=int, default=64, help="Gaussians")
    p.add_argument("--cutoff", type=float, default=6.0, help="Angstrom")
    p.add_argument("--stress", action="store_true", help="also compute the stress")
    p.add_argument(
        "--mode", choices=["general", "umas_fast_pytorch"], default="general", help="execution backend"
    )
    p.add_argument("--warmup", type=int, default=3)
    p.add_argument("--iters", type=int, default=10)
    return p.parse_args(argv)


def build_model(args, data):
    """Return backbone and energy-and-forces head, prepared for inference as fairchem's predictor does."""
    import torch
    from fairchem.core.models.uma.escn_md import MLP_EFS_Head, eSCNMDBackbone
    from fairchem.core.units.mlip_unit.api.inference import InferenceSettings

    torch.manual_seed(0)
    c = args.channels
    backbone = eSCNMDBackbone(
        sphere_channels=c,
        hidden_channels=c,
        edge_channels=c,
        lmax=args.lmax,
        mmax=args.mmax,
        num_layers=args.layers,
        num_distance_basis=args.num_basis,
        cutoff=args.cutoff,
        max_neighbors=300,
        otf_graph=True,
        always_use_pbc=False,
        direct_forces=False,
        regress_forces=True,
        regress_stress=args.stress,
        norm_type="rms_norm_sh",
        act_type="gate",
        ff_type="spectral",
        chg_spin_emb_type="rand_emb",
        dataset_mapping={"omat": "omat"},
        execution_mode=args.mode,
    )
    head = MLP_EFS_Head(backbone, wrap_property=False)
    backbone.eval()
    head.eval()
    settings = InferenceSettings(
        tf32=False,
        activation_checkpointing=False,
        merge_mole=False,
        compile=False,
        external_graph_gen=False,
        internal_graph_gen_version=2,
        execution_mode=args.mode,
        base_precision_dtype=torch.float32,
    )
    backbone = backbone.prepare_for_inference(data.clone(), settings)
    backbone.requires_grad_(False)
    head.requires_grad_(False)
    return backbone, head


def measure(args, n_atoms):
    """Time one size in this process and return the record that is printed."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import torch

    torch.set_num_threads(args.threads)
    from importlib.metadata import version

    from fairchem.core.datasets.atomic_data import AtomicData

    atoms = silver(n_atoms)
    atoms.info.update(charge=0, spin=0)
    data = AtomicData.from_ase(
        atoms,
        task_name="omat",
        r_data_keys=["spin", "charge"],
        target_dtype=torch.float32,
        r_energy=False,
        r_forces=False,
        r_stress=False,
    )
    backbone, head = build_model(args, data)
    gen = torch.Generator().manual_seed(5)
    jitter = [(2 * torch.rand(data.pos.shape, generator=gen) - 1) * JITTER for _ in range(4)]
    out = {}

    def fresh(i):
        d = data.clone()
        d.pos = data.pos + jitter[i % 4]
        return d

    def energy_and_forces(i):
        d = fresh(i)
        o = head(d, backbone(d))
        out.update(energy=float(o["energy"]), forces=o["forces"].detach())

    def graph(i):
        d = fresh(i)
        d["atomic_numbers_full"], d["batch_full"] = d["atomic_numbers"], d["batch"]
        out["edges"] = backbone._generate_graph(d)["edge_index"].shape[1]

    base = rss_mib()
    t = time.perf_counter()
    energy_and_forces(0)
    first_ms = (time.perf_counter() - t) * 1e3
    times = milliseconds(energy_and_forces, max(args.warmup - 1, 0), args.iters)
    peak = rss_mib()
    graph_times = milliseconds(graph, 1, args.iters)
    params = sum(p.numel() for m in (backbone, head) for p in m.parameters())
    return {
        "impl": f"fairchem-core {version('fairchem-core')}",
        "atoms": n_atoms,
        "edges": out["edges"],
        "mode": args.mode,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "channels": args.channels,
        "lmax": args.lmax,
        "mmax": args.mmax,
        "layers": args.layers,
        "cutoff": args.cutoff,
        "num_basis": args.num_basis,
        "stress": args.stress,
        "params": params,
        "ms_median": round(statistics.median(times), 2),
        "ms_min": round(min(times), 2),
        "ms_max": round(max(times), 2),
        "graph_ms_median": round(statistics.median(graph_times), 2),
        "first_ms": round(first_ms, 1),
        "peak_rss_mib": round(peak, 1),
        "base_rss_mib": round(base, 1),
        "iters": args.iters,
        "energy_per_atom": out["energy"] / n_atoms,
        "f_rms": float(out["forces"].pow(2).mean().sqrt()),
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def main():
    """Measure every size, each in its own process."""
    args = parse_args()
    if len(args.atoms) == 1:
        print(json.dumps(measure(args, args.atoms[0])), flush=True)
        return 0
    rest = sys.argv[1:]
    if "--atoms" in rest:  # drop the list, each child gets one size
        i = rest.index("--atoms")
        j = i + 1
        while j < len(rest) and rest[j].isdigit():
            j += 1
        rest = rest[:i] + rest[j:]
    return in_processes([os.path.abspath(__file__)], args.atoms, rest, args.threads)


if __name__ == "__main__":
    sys.exit(main())
