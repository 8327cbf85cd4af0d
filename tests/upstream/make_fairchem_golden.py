#!/usr/bin/env python
"""Write the eSCN-MD reference files of ``tests/golden/fairchem`` by running fairchem-core.

Needs an environment of its own with ``fairchem-core==2.24.0`` (CPU is enough); gnnmd is neither needed nor
imported.

    python make_fairchem_golden.py                     # write every file that is missing
    python make_fairchem_golden.py s2_l2m2 pos_emb     # (re)write these
    python make_fairchem_golden.py --list              # names and what they cover
    python make_fairchem_golden.py --check             # re-run upstream on the stored weights and compare
    python make_fairchem_golden.py --accept            # which sizes and option values upstream accepts

Every file holds a small model with random weights (exact in float32, evaluated in float64) and its outputs
on a few small systems.  The five base systems are read from ``conserv_l2m2_gate_spectral.npz``, which is not
made by this script.  Format: README.md beside the files.
"""

import argparse
import io
import json
import os
import sys
import traceback
import zipfile
import zlib

import in_float64  # noqa: F401 (first)
import numpy as np
import torch
from fairchem.core.modules.normalization.element_references import ElementReferences
from fairchem.core.modules.normalization.normalizer import Normalizer
from fairchem_cases import CASES
from fairchem_model import BB, ROLL_SPHERE, build, evaluate, finite_difference, randomise
from fairchem_options import accept
from fairchem_systems import BATCH, GOLDEN, base_systems, make_data, stored_system


def save_npz(path, arrays):
    """``np.savez_compressed`` with a fixed date and smaller zip headers: equal input gives an equal file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as f:
        for k, a in arrays.items():
            b = io.BytesIO()
            np.lib.format.write_array(b, np.asarray(a), allow_pickle=False)
            f.writestr(zipfile.ZipInfo(k + ".npy"), b.getvalue(), zipfile.ZIP_DEFLATED, 9)


def head_meta(heads):
    return {n: c for n, (c, _) in heads.items()}, {n: kw for n, (c, kw) in heads.items() if kw}


def write_case(name, seed):
    c = CASES[name]
    bb = dict(BB, **c["bb"])
    systems = base_systems()
    if c["systems"]:
        systems = c["systems"](systems)
    heads = c["heads"]
    fixed = c["roll"] is not None
    model = build(bb, heads, c["moe"], c["model_id"], seed)
    randomise(model, systems, seed)
    arrays, per = {}, {}
    if bb.get("regress_hessian"):
        systems = {n: systems[n] for n in ["nacl2_triclinic", "mol_charged"]}
    spread = 0.0
    for n, s in systems.items():
        res, data = evaluate(model, heads, [s], fixed)
        per[n] = res
        other = evaluate(model, heads, [s], False, roll_seed=77)[0]
        for k in res:
            spread = max(spread, float(np.abs(res[k] - other[k]).max()))
        p = f"sys/{n}/"
        s["positions"] = data["pos"].detach().numpy().copy()
        arrays.update(
            {
                p + "positions": s["positions"],
                p + "atomic_numbers": data["atomic_numbers"].numpy().astype(np.int64),
                p + "cell": data["cell"].detach().numpy()[0],
                p + "pbc": data["pbc"].numpy().reshape(3),
                p + "charge_spin": np.array([s["charge"], s["spin"]], dtype=np.int64),
                p + "dataset": np.array(s["dataset"]),
            }
        )
        for k, v in res.items():
            arrays[p + "out/" + k] = v
    batch_de = None
    if c["batch"]:
        order = BATCH + [n for n in systems if n not in BATCH and n != "isolated_noedge"]
        res, data = evaluate(model, heads, [systems[n] for n in order], fixed)
        arrays["batch/order"] = np.array(order)
        for k, v in res.items():
            arrays["batch/out/" + k] = v
        batch_de = float(np.abs(res["energy"] - np.array([per[n]["energy"][0] for n in order])).max())
    fd = None
    if c["fd"] and "forces" in per["mol_charged"]:
        fd = finite_difference(model, heads, systems["mol_charged"], fixed, per["mol_charged"]["forces"])
    sd = dict(model.state_dict().items())
    dropped = [k for k in sd if ".Jd_" in k]
    for k in dropped:
        sd.pop(k)
    for k, v in sd.items():
        a = v.numpy()
        f = a.astype(np.float32)
        assert (f.astype(np.float64) == a).all(), k
        arrays["sd/" + k] = f
    hm, hk = head_meta(heads)
    meta = {
        "name": name,
        "generator": "fairchem-core 2.24.0",
        "torch": torch.__version__,
        "dtype": "float64 (weights float32-representable)",
        "doc": c["doc"],
        "spec": {"model": "moe" if c["moe"] is not None else "escnmd", "bb": c["bb"], "head": c["head"]},
        "backbone_kwargs": bb,
        "dropped_state_keys": dropped,
        "gamma_spread": spread,
        "batch_vs_single_dE": batch_de,
        "fd_force_err": fd,
        "heads": hm,
        "head_kwargs": hk,
        "params": sum(p.numel() for p in model.parameters()),
        "roll": ROLL_SPHERE if fixed else "any",
    }
    if c["moe"] is not None:
        meta["spec"].update(moe=c["moe"], model_id=c["model_id"])
    if c["norm"]:
        add_normalised(arrays, meta, systems, per)
    arrays = dict(meta=np.array(json.dumps(meta)), **arrays)
    path = os.path.join(GOLDEN, name + ".npz")
    save_npz(path, arrays)
    fmax = (
        max(float(np.abs(r["forces"]).max()) for r in per.values())
        if "forces" in per["mol_charged"]
        else float("nan")
    )
    print(
        f"{name:24s} {os.path.getsize(path) / 1024:6.1f} KiB  fmax {fmax:.3g}  roll spread {spread:.1e}  "
        f"batch-single {batch_de}  finite difference {fd}",
        flush=True,
    )


def add_normalised(arrays, meta, systems, per):
    """Add the outputs after upstream's Normalizer and, for the energy only, ElementReferences."""
    rng = np.random.default_rng(11)
    refs = torch.zeros(100)
    for z in sorted({int(v) for s in systems.values() for v in s["atomic_numbers"]}):
        refs[z] = float(rng.normal(0, 30))
    rmsd, mean = 1.423, -0.25
    e_norm, d_norm, er = (
        Normalizer(mean=mean, rmsd=rmsd),
        Normalizer(mean=0.0, rmsd=rmsd),
        ElementReferences(refs),
    )
    arrays["norm/element_references"] = refs.numpy()
    arrays["norm/energy_mean_rmsd"] = np.array([mean, rmsd])
    arrays["norm/forces_mean_rmsd"] = np.array([0.0, rmsd])
    arrays["norm/stress_mean_rmsd"] = np.array([0.0, rmsd])
    meta["normalised_keys"] = "sys/<name>/out_norm/*: physical values; sys/<name>/out/*: raw"
    for n, s in systems.items():
        data = make_data([s])
        data["batch_full"], data["atomic_numbers_full"] = data["batch"], data["atomic_numbers"]
        e = er.undo_refs(data, e_norm.denorm(torch.from_numpy(per[n]["energy"])))
        arrays[f"sys/{n}/out_norm/energy"] = e.numpy()
        for k in ("forces", "stress"):
            arrays[f"sys/{n}/out_norm/{k}"] = d_norm.denorm(torch.from_numpy(per[n][k])).numpy()


def check(path):
    """Load the stored weights into upstream's model and compare its outputs with the stored ones."""
    z = np.load(path)
    meta = json.loads(str(z["meta"]))
    spec = meta["spec"]
    heads = {n: (c, dict(meta.get("head_kwargs", {}).get(n, {}))) for n, c in meta["heads"].items()}
    for c, kw in heads.values():
        if c == "DatasetSpecificSingleHeadWrapper" and not kw:
            kw.update(
                head_cls="MLP_EFS_Head",
                head_kwargs={"wrap_property": False},
                dataset_names=["omol", "omat", "oc20"],
            )
    model = build(meta["backbone_kwargs"], heads, spec.get("moe"), spec.get("model_id"))
    sd = {k[3:]: torch.from_numpy(z[k]).double() for k in z.files if k.startswith("sd/")}
    missing, unexpected = model.load_state_dict(sd, strict=False)
    missing = [k for k in missing if ".Jd_" not in k]
    assert not missing, missing
    assert not unexpected, unexpected
    fixed = meta.get("roll", "any") != "any"
    names = sorted({k.split("/")[1] for k in z.files if k.startswith("sys/")})
    systems, worst = {}, {}

    def compare(res, prefix):
        for k, v in res.items():
            worst[k] = max(worst.get(k, 0.0), float(np.abs(v - z[prefix + k]).max()))
        have = {k[len(prefix) :] for k in z.files if k.startswith(prefix)}
        assert have == set(res), (have, set(res))

    for n in names:
        p = f"sys/{n}/"
        systems[n] = stored_system(z, n)
        compare(evaluate(model, heads, [systems[n]], fixed)[0], p + "out/")
    if "batch/order" in z.files:
        compare(evaluate(model, heads, [systems[str(n)] for n in z["batch/order"]], fixed)[0], "batch/out/")
    print(f"{meta['name']:28s} " + "  ".join(f"{k} {v:.1e}" for k, v in worst.items()), flush=True)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("names", nargs="*", help="cases to (re)write; default: all missing ones")
    ap.add_argument("--list", action="store_true")
    ap.add_argument("--check", action="store_true")
    ap.add_argument("--accept", action="store_true")
    ap.add_argument("--all", action="store_true", help="rewrite every case")
    args = ap.parse_args()
    if args.list:
        for n, c in CASES.items():
            print(f"{n:26s} {c['doc']}")
        return
    if args.accept:
        accept()
        return
    if args.check:
        for f in sorted(os.listdir(GOLDEN)):
            if f.endswith(".npz") and (not args.names or f[:-4] in args.names):
                check(os.path.join(GOLDEN, f))
        return
    bad = []
    for n in CASES:
        if (args.names and n not in args.names) or (
            not args.names and not args.all and os.path.exists(os.path.join(GOLDEN, n + ".npz"))
        ):
            continue
        try:
            write_case(n, seed=zlib.crc32(n.encode()) % 10000)
        except Exception as x:
            bad.append(n)
            print(f"{n}: {type(x).__name__}: {x}", flush=True)
            traceback.print_exc()
    if bad:
        sys.exit(f"failed: {bad}")


if __name__ == "__main__":
    main()
