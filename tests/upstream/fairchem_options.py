"""Which sizes and option values fairchem-core accepts."""

import in_float64  # noqa: F401 (first)
import numpy as np
from fairchem_cases import moe_kw
from fairchem_model import BB, EFS, build, evaluate
from fairchem_systems import base_systems


def accept():
    """One line per option value: does upstream build and run it?"""

    def attempt(label, bb=None, moe=None, heads=EFS, systems=None):
        try:
            kw = dict(BB, **(bb or {}))
            m = build(kw, heads, moe)
            s = systems or base_systems()
            r, _ = evaluate(m, heads, [s["nacl2_triclinic"], s["mol_charged"]], False)
            ok = all(np.isfinite(v).all() for v in r.values())
            print(f"{label:60s} {'runs' if ok else 'NOT FINITE'}", flush=True)
        except Exception as x:
            print(f"{label:60s} {type(x).__name__}: {str(x)[:150]}".replace("\n", " "), flush=True)

    tiny = {}
    for act in ("gate", "s2"):
        for ff in ("spectral", "grid"):
            for l in range(0, 7):
                for m in range(0, l + 1):
                    if l > 4 and m not in (0, 2, l):
                        continue
                    attempt(
                        f"act {act} ff {ff} lmax {l} mmax {m}",
                        dict(tiny, lmax=l, mmax=m, act_type=act, ff_type=ff),
                    )
    attempt("lmax 1 mmax 2", dict(tiny, lmax=1, mmax=2))
    attempt("lmax 11 mmax 1", dict(tiny, lmax=11, mmax=1))
    attempt("lmax 12 mmax 1", dict(tiny, lmax=12, mmax=1))
    for nt in ("layer_norm", "layer_norm_sh", "rms_norm_sh", "rms_norm"):
        attempt(f"norm {nt}", dict(tiny, norm_type=nt))
        attempt(f"norm {nt} lmax 0", dict(tiny, norm_type=nt, lmax=0, mmax=0, ff_type="grid"))
    for g in (4, 5, 6, 7, 8, 9, 10, 11, 20, 21):
        attempt(f"grid_resolution {g} lmax 2", dict(tiny, grid_resolution=g, ff_type="grid"))
    attempt("num_layers 0", {"num_layers": 0})
    attempt("distance_function bessel", dict(tiny, distance_function="bessel"))
    attempt("ff_type other", dict(tiny, ff_type="other"))
    attempt("act_type other", dict(tiny, act_type="other"))
    attempt("chg_spin_emb_type other", dict(tiny, chg_spin_emb_type="other"))
    attempt("sphere_channels 5 (odd)", dict(tiny, sphere_channels=5))
    attempt("num_distance_basis 1", dict(tiny, num_distance_basis=1))
    attempt("balanced not contiguous", dict(tiny, charge_balanced_channels=[0, 2]))
    attempt("balanced unordered [2,1]", dict(tiny, charge_balanced_channels=[2, 1]))
    attempt("balanced beyond C", dict(tiny, charge_balanced_channels=[3, 4, 5]))
    attempt("dataset_mapping None", dict(tiny, dataset_mapping=None))
    attempt("dataset_mapping {}", dict(tiny, dataset_mapping={}))
    attempt("dataset_mapping value not a key", dict(tiny, dataset_mapping={"omat": "x", "omol": "omol"}))
    attempt("dataset not in mapping", dict(tiny, dataset_mapping={"omat": "omat"}))
    attempt("dataset_list and dataset_mapping", dict(tiny, dataset_list=["omat"]))
    attempt("dataset_list alone", dict(tiny, dataset_mapping=None, dataset_list=["omat", "omol"]))
    for mn in (0, -1, 1):
        attempt(f"max_neighbors {mn}", dict(tiny, max_neighbors=mn))
    for v in (1, 2, 3):
        attempt(f"radius_pbc_version {v}", dict(tiny, radius_pbc_version=v))
    attempt("charge 101 rand_emb", tiny, systems=None)
    for t in ("so2", "so2m0", "all", "notso2", "other"):
        for ff in ("spectral", "grid"):
            attempt(f"moe_type {t} ff {ff}", dict(tiny, ff_type=ff), moe=moe_kw(moe_type=t))
    for t in ("softmax", "pnorm", "other"):
        attempt(f"moe norm {t}", tiny, moe=moe_kw(moe_expert_coefficient_norm=t))
    for t in ("pytorch", "dgl", "other"):
        attempt(f"moe_layer_type {t}", tiny, moe=moe_kw(moe_layer_type=t))
    for l in ([], [0], [1], [2], [-1]):
        attempt(f"layers_moe {l} of 2", {"num_layers": 2}, moe=moe_kw(layers_moe=l))
    attempt("num_experts 1", tiny, moe=moe_kw(num_experts=1))
    attempt("MLP_Energy_Head with conservative forces", tiny, heads={"energy": ("MLP_Energy_Head", {})})
    attempt(
        "MLP_Energy_Head direct",
        dict(tiny, direct_forces=True, regress_stress=False),
        heads={"energy": ("MLP_Energy_Head", {})},
    )
    attempt("Linear_Energy_Head with conservative forces", tiny, heads={"energy": ("Linear_Energy_Head", {})})
    attempt("EFS head on a direct model", dict(tiny, direct_forces=True, regress_stress=False))
    attempt(
        "EFS head on a direct model with regress_stress", dict(tiny, direct_forces=True, regress_stress=True)
    )
    attempt(
        "stress head lmax 1",
        dict(tiny, direct_forces=True, regress_stress=False, lmax=1, mmax=1),
        heads={"stress": ("MLP_Stress_Head", {})},
    )
    attempt(
        "force head lmax 0",
        dict(tiny, direct_forces=True, regress_stress=False, lmax=0, mmax=0, ff_type="grid"),
        heads={"forces": ("Linear_Force_Head", {})},
    )
    attempt("hessian of a batch of two", dict(tiny, regress_hessian=True))
    wrap = {"head_cls": "MLP_EFS_Head", "head_kwargs": {"wrap_property": False}}
    attempt(
        "DatasetSpecificMoEWrapper dataset_names",
        tiny,
        heads={"e": ("DatasetSpecificMoEWrapper", dict(wrap, dataset_names=["omol", "omat"]))},
    )
    attempt(
        "DatasetSpecificMoEWrapper inner wrap_property True",
        tiny,
        heads={
            "e": (
                "DatasetSpecificMoEWrapper",
                {"head_cls": "MLP_EFS_Head", "dataset_names": ["omol", "omat"]},
            )
        },
    )
    attempt(
        "DatasetSpecificMoEWrapper Linear_Energy_Head",
        dict(tiny, regress_forces=False, regress_stress=False),
        heads={
            "e": (
                "DatasetSpecificMoEWrapper",
                {"head_cls": "Linear_Energy_Head", "dataset_names": ["omol", "omat"]},
            )
        },
    )
    attempt(
        "DatasetSpecificSingleHeadWrapper unknown dataset",
        tiny,
        heads={"e": ("DatasetSpecificSingleHeadWrapper", dict(wrap, dataset_names=["omol"]))},
    )
