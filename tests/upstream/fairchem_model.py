"""fairchem-core's model with random weights, and what it says of systems."""

import copy

import in_float64  # noqa: F401 (first)
import numpy as np
import torch
from fairchem.core.models.base import HydraModel
from fairchem.core.models.uma import escn_md
from fairchem.core.models.uma.common.quaternion.quaternion_utils import quaternion_edge_to_y_stable
from fairchem.core.models.uma.common.quaternion.wigner_d_custom_kernels import quaternion_to_rotation_matrix
from fairchem_systems import make_data

BB = {
    "max_num_elements": 100,
    "sphere_channels": 4,
    "lmax": 2,
    "mmax": 2,
    "grid_resolution": None,
    "otf_graph": True,
    "max_neighbors": 300,
    "cutoff": 6.0,
    "edge_channels": 4,
    "distance_function": "gaussian",
    "num_distance_basis": 6,
    "direct_forces": False,
    "regress_forces": True,
    "regress_stress": True,
    "num_layers": 1,
    "hidden_channels": 6,
    "norm_type": "rms_norm_sh",
    "act_type": "gate",
    "ff_type": "spectral",
    "chg_spin_emb_type": "rand_emb",
    "cs_emb_grad": True,
    "dataset_emb_grad": False,
    "use_dataset_embedding": True,
    "dataset_mapping": {"omol": "omol", "omat": "omat", "oc20": "oc20"},
    "always_use_pbc": False,
    "radius_pbc_version": 2,
    "use_quaternion_wigner": True,
}

_MD, _MOE = "fairchem.core.models.uma.escn_md.", "fairchem.core.models.uma.escn_moe."
HEAD_PATH = {
    c: _MD + c
    for c in ["MLP_EFS_Head", "MLP_Energy_Head", "Linear_Energy_Head", "Linear_Force_Head", "MLP_Stress_Head"]
}
HEAD_PATH.update({c: _MOE + c for c in ["DatasetSpecificMoEWrapper", "DatasetSpecificSingleHeadWrapper"]})

EFS = {"energyandforcehead": ("MLP_EFS_Head", {})}
DIRECT = {
    "energy": ("MLP_Energy_Head", {}),
    "forces": ("Linear_Force_Head", {}),
    "stress": ("MLP_Stress_Head", {}),
}

ROLL_SPHERE = (
    "fixed: s=sign(ey) (0 -> +1), (a,b,c)=(s ex, s ey, ez), k=1/(1+b), "
    "R=[[1-a^2 k,-a,-a c k],[a,b,c],[-a c k,-c,1-c^2 k]] diag(s,s,1); "
    "forces and stress contain the derivative of this R"
)


def spec_rotation(e):
    """The rotation matrices R (R e = +y) written into ``meta["roll"]``."""
    one = torch.ones_like(e[:, 1])
    s = torch.where(e[:, 1] < 0, -one, one)
    a, b, c = s * e[:, 0], s * e[:, 1], e[:, 2]
    k = 1 / (1 + b)
    r = torch.stack([1 - a * a * k, -a, -a * c * k, a, b, c, -a * c * k, -c, 1 - c * c * k], dim=-1).view(
        -1, 3, 3
    )
    return r * torch.stack([s, s, one], dim=-1)[:, None, :]


class FixedRoll:
    """Inside the context upstream's random roll about the edge is replaced by that of ``spec_rotation``."""

    def __enter__(self):
        self.orig = orig = escn_md.axis_angle_wigner_hybrid

        def fixed(vec, lmax, gamma=None, **kw):
            e = torch.nn.functional.normalize(vec, dim=-1)
            r = spec_rotation(e)
            m = r @ quaternion_to_rotation_matrix(quaternion_edge_to_y_stable(e)).transpose(
                1, 2
            )  # a rotation about y
            w, winv = orig(vec, lmax, gamma=torch.atan2(m[:, 0, 2], m[:, 0, 0]), **kw)
            if lmax > 0:
                err = (w[:, 1:4, 1:4] - r).abs().max()
                assert err < 1e-11, f"the roll is not the wanted one ({err})"
            return w, winv

        escn_md.axis_angle_wigner_hybrid = fixed

    def __exit__(self, *a):
        escn_md.axis_angle_wigner_hybrid = self.orig


def build(bb, heads, moe=None, model_id=None, seed=0):
    torch.manual_seed(seed)
    backbone = dict(copy.deepcopy(bb), **copy.deepcopy(moe or {}))
    backbone["model"] = _MOE + "eSCNMDMoeBackbone" if moe is not None else _MD + "eSCNMDBackbone"
    hcfg = {}
    for name, (cls, kw) in heads.items():
        kw = copy.deepcopy(kw)
        if "head_cls" in kw:
            kw["head_cls"] = HEAD_PATH[kw["head_cls"]]
        hcfg[name] = dict(kw, module=HEAD_PATH[cls])
    m = HydraModel(backbone=backbone, heads=hcfg, model_id=model_id)
    m.eval()

    def cast(mod, args):
        return (args[0].to(mod.weight.dtype),)

    for emb in (m.backbone.charge_embedding, m.backbone.spin_embedding):
        if hasattr(emb, "lin_emb"):  # upstream forces the input to float32, which a float64 layer refuses
            emb.lin_emb.register_forward_pre_hook(cast)
    return m


ELEMENT_TABLES = (
    "sphere_embedding.weight",
    "source_embedding.weight",
    "target_embedding.weight",
    "composition_embedding.weight",
)


def randomise(model, systems, seed):
    """Make every parameter matter, round it to bfloat16, zero the table rows that no system uses."""
    g = torch.Generator().manual_seed(1000 + seed)
    used_z = sorted({int(v) for s in systems.values() for v in s["atomic_numbers"]})
    used_q = sorted({s["charge"] + 100 for s in systems.values()})
    used_s = sorted({s["spin"] for s in systems.values()})
    done = set()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if id(p) in done:
                continue
            done.add(id(p))
            r = torch.randn(p.shape, generator=g)
            if name.endswith(("source_embedding.weight", "target_embedding.weight")):
                p.copy_(0.5 * r)
            elif name.endswith(("affine_weight", "norm_l0.weight")) or (
                ".rad_func.net." in name and name.endswith(".weight") and p.ndim == 1
            ):
                p.add_(0.1 * r)
            elif p.ndim == 1 and not name.endswith(".W"):  # biases; pos_emb's W stays N(0,1)
                p.add_(0.15 * r)
            rows = None
            if name.endswith(ELEMENT_TABLES):
                rows = used_z
            elif name.endswith("charge_embedding.rand_emb.weight"):
                rows = used_q
            elif name.endswith("spin_embedding.rand_emb.weight"):
                rows = used_s
            if rows is not None:
                keep = torch.zeros(p.shape[0], dtype=torch.bool)
                keep[rows] = True
                p[~keep] = 0
            p.copy_(
                p.bfloat16().double()
            )  # 8 significant bits: exact in float32, and the file compresses to half


def collect(out, data, model, heads):
    """Raw head outputs -> dict(energy, forces, stress, hessian, node_embedding_l0_sum)."""
    res = {}
    n_sys = len(data["natoms"])
    for name, (cls, kw) in heads.items():
        flat = {}
        for k, v in out[name].items():
            flat[k] = v[next(iter(v))] if isinstance(v, dict) else v
        for prop in ("energy", "forces", "stress", "hessian"):
            if cls.startswith("DatasetSpecific"):
                parts = [v for k, v in flat.items() if k.endswith("_" + prop)]  # zero outside the own dataset
                val = sum(parts) if parts else None
            else:
                p = kw.get("prefix")
                val = flat.get(f"{p}_{prop}" if p else prop)
            if val is None:
                continue
            val = val.detach()
            res[prop] = val.reshape(n_sys, 9) if prop == "stress" else val
    return {k: v.numpy() for k, v in res.items()}


def evaluate(model, heads, sys_list, fixed_roll, roll_seed=0):
    data = make_data(sys_list)
    emb = {}
    hook = model.backbone.register_forward_hook(lambda m, i, o: emb.update(o))
    torch.manual_seed(roll_seed)
    try:
        if fixed_roll:
            with FixedRoll():
                out = model(data)
        else:
            out = model(data)
    finally:
        hook.remove()
    res = collect(out, data, model, heads)
    res["node_embedding_l0_sum"] = emb["node_embedding"][:, 0, :].sum(-1).detach().numpy()
    return res, data


def finite_difference(model, heads, s, fixed_roll, forces, h=2e-4):
    """Largest difference of five force components to fourth-order central differences of the energy."""
    rng = np.random.default_rng(3)
    worst = 0.0
    for _ in range(5):
        i, c = rng.integers(len(s["positions"])), rng.integers(3)
        e = []
        for k in (-2, -1, 1, 2):
            t = dict(s, positions=s["positions"].copy())
            t["positions"][i, c] += k * h
            e.append(float(evaluate(model, heads, [t], fixed_roll)[0]["energy"][0]))
        worst = max(worst, abs(-(e[0] - 8 * e[1] + 8 * e[2] - e[3]) / (12 * h) - forces[i, c]))
    return worst
