"""Which model, systems and options each eSCN-MD reference file holds."""

import in_float64  # noqa: F401 (first)
from fairchem_model import BB, DIRECT, EFS
from fairchem_systems import boxed_molecules, charged_variants, drop_isolated, with_single_atoms, with_ties


def case(
    doc,
    bb=None,
    moe=None,
    heads=None,
    systems=None,
    model_id=None,
    head="efs",
    roll=None,
    fd=True,
    batch=True,
    norm=False,
):
    return {
        "doc": doc,
        "bb": bb or {},
        "moe": moe,
        "heads": heads or EFS,
        "systems": systems,
        "model_id": model_id,
        "head": head,
        "roll": roll,
        "fd": fd,
        "batch": batch,
        "norm": norm,
    }


def moe_kw(**kw):
    return dict(
        {
            "num_experts": 3,
            "use_composition_embedding": True,
            "moe_expert_coefficient_norm": "softmax",
            "moe_layer_type": "pytorch",
            "model_version": 1.1,
        },
        **kw,
    )


MAP_NONID = {"oc20": "omat", "omol": "omol", "omat": "omat"}
FLAT = {"direct_forces": True, "regress_stress": False}
CASES = {
    # edge activation on the sphere
    "s2_l2m2": case("act_type s2, lmax == mmax", {"act_type": "s2", "num_layers": 2}, roll=True),
    "s2_l3m1": case("act_type s2, lmax > mmax", {"act_type": "s2", "lmax": 3, "mmax": 1}, roll=True),
    "s2_l3m2_grid": case(
        "act_type s2 and grid feed-forward, lmax > mmax",
        {"act_type": "s2", "lmax": 3, "mmax": 2, "ff_type": "grid"},
        roll=True,
    ),
    "s2_l1m0": case(
        "act_type s2, mmax 0 (one azimuthal point)", {"act_type": "s2", "lmax": 1, "mmax": 0}, roll=True
    ),
    "s2_l2m2_res10": case(
        "act_type s2 and grid feed-forward with grid_resolution 10",
        {"act_type": "s2", "ff_type": "grid", "grid_resolution": 10},
        roll=True,
    ),
    "grid_l2m2_res10": case(
        "grid feed-forward with grid_resolution 10", {"ff_type": "grid", "grid_resolution": 10}
    ),
    "grid_l2m2": case("grid feed-forward, lmax == mmax", {"ff_type": "grid"}),
    # charge, spin, dataset
    "pos_emb": case(
        "chg_spin_emb_type pos_emb; several charges and spins",
        {"chg_spin_emb_type": "pos_emb"},
        systems=charged_variants,
    ),
    "lin_emb": case(
        "chg_spin_emb_type lin_emb; several charges and spins",
        {"chg_spin_emb_type": "lin_emb", "cs_emb_grad": False},
        systems=charged_variants,
    ),
    "no_dataset_embedding": case(
        "use_dataset_embedding False", {"use_dataset_embedding": False, "dataset_mapping": None}
    ),
    "dataset_mapping": case("dataset_mapping that is not the identity", {"dataset_mapping": MAP_NONID}),
    # norms
    "layer_norm_sh": case("norm_type layer_norm_sh", {"norm_type": "layer_norm_sh", "num_layers": 2}),
    "layer_norm_sh_l3m2": case(
        "norm_type layer_norm_sh, lmax 3", {"norm_type": "layer_norm_sh", "lmax": 3, "mmax": 2}
    ),
    "layer_norm_l3m3": case(
        "norm_type layer_norm, lmax 3", {"norm_type": "layer_norm", "lmax": 3, "mmax": 3}
    ),
    # channel balancing
    "spin_balanced": case(
        "spin_balanced_channels", {"spin_balanced_channels": [2]}, systems=charged_variants
    ),
    "charge_spin_balanced": case(
        "both balanced, overlapping in one channel, rand_emb",
        {"charge_balanced_channels": [1, 2], "spin_balanced_channels": [2, 3], "num_layers": 2},
        systems=charged_variants,
    ),
    # neighbour truncation
    "max_neighbors": case("max_neighbors 8 with ties", {"max_neighbors": 8}, systems=with_ties, fd=False),
    # sizes
    "l0m0": case("lmax 0", {"lmax": 0, "mmax": 0}),
    "l1m1": case("lmax 1, mmax 1", {"lmax": 1, "mmax": 1}),
    "l2m0": case("lmax 2, mmax 0", {"lmax": 2, "mmax": 0}),
    "l2m1": case("lmax 2, mmax 1", {"lmax": 2, "mmax": 1}),
    "l3m3": case("lmax 3, mmax 3", {"lmax": 3, "mmax": 3, "num_layers": 2}),
    "l4m2": case("lmax 4, mmax 2", {"lmax": 4, "mmax": 2, "num_layers": 2}),
    "l4m4": case("lmax 4, mmax 4", {"lmax": 4, "mmax": 4}),
    "l4m3_grid": case("lmax 4, mmax 3, grid feed-forward", {"lmax": 4, "mmax": 3, "ff_type": "grid"}),
    "l5m2": case("lmax 5, mmax 2", {"lmax": 5, "mmax": 2, "hidden_channels": 4}),
    "l6m2": case("lmax 6, mmax 2", {"lmax": 6, "mmax": 2, "hidden_channels": 4}),
    "l6m6": case(
        "lmax 6, mmax 6",
        {"lmax": 6, "mmax": 6, "sphere_channels": 2, "hidden_channels": 2, "edge_channels": 2},
    ),
    "layers0": case("no layer at all (embeddings, norm, head)", {"num_layers": 0}),
    "layers3": case("three layers", {"num_layers": 3}),
    "odd_channels": case(
        "sphere 6, hidden 10, edge 5 channels, cutoff 4.5, 9 Gaussians",
        {
            "sphere_channels": 6,
            "hidden_channels": 10,
            "edge_channels": 5,
            "num_distance_basis": 9,
            "cutoff": 4.5,
        },
    ),
    # mixture of experts
    "moe_nocomp": case("experts without composition embedding", moe=moe_kw(use_composition_embedding=False)),
    "moe_pnorm": case(
        "coefficient norm pnorm, composition embedding", moe=moe_kw(moe_expert_coefficient_norm="pnorm")
    ),
    "moe_layers": case("layers_moe [1] of two blocks", {"num_layers": 2}, moe=moe_kw(layers_moe=[1])),
    "moe_single": case(
        "moe_single (shared expert layers)",
        {"sphere_channels": 4, "hidden_channels": 4, "num_layers": 2},
        moe=moe_kw(moe_single=True),
    ),
    "moe_so2m0": case("moe_type so2m0", moe=moe_kw(moe_type="so2m0")),
    "moe_all": case(
        "moe_type all, spectral feed-forward; no batch (upstream routes nodes by edge counts)",
        moe=moe_kw(moe_type="all"),
        batch=False,
        systems=drop_isolated,
    ),
    "moe_notso2_grid": case(
        "moe_type notso2, grid feed-forward; no batch",
        {"ff_type": "grid"},
        moe=moe_kw(moe_type="notso2"),
        batch=False,
        systems=drop_isolated,
    ),
    "moe_uma_s_1p2": case(
        "model_id UMA-S-1.2 (composition mean over n+1)", moe=moe_kw(), model_id="UMA-S-1.2"
    ),
    "moe_l3m2": case("experts with lmax 3, mmax 2", {"lmax": 3, "mmax": 2}, moe=moe_kw()),
    "moe_posemb_charges": case(
        "experts, pos_emb, several charges, dataset_mapping",
        {"chg_spin_emb_type": "pos_emb", "dataset_mapping": MAP_NONID},
        moe=moe_kw(),
        systems=charged_variants,
        model_id="UMA-1.1",
    ),
    # heads
    "head_linear_energy": case(
        "Linear_Energy_Head",
        {"regress_forces": False, "regress_stress": False},
        heads={"energy": ("Linear_Energy_Head", {})},
        head="linear_energy",
    ),
    "head_efs_nostress": case("MLP_EFS_Head, forces only", {"regress_stress": False}),
    "head_efs_mean": case(
        "MLP_EFS_Head, reduce mean, prefix",
        {},
        heads={"energyandforcehead": ("MLP_EFS_Head", {"reduce": "mean", "prefix": "omat"})},
        head="efs_mean",
        fd=False,
    ),
    "head_efs_direct_stress": case(
        "conservative forces with MLP_Stress_Head (direct_stress)",
        {"direct_stress": True},
        heads={"energyandforcehead": ("MLP_EFS_Head", {}), "stress": ("MLP_Stress_Head", {})},
        head="efs+direct_stress",
    ),
    "head_ds_moe": case(
        "DatasetSpecificMoEWrapper around MLP_EFS_Head",
        {},
        heads={
            "energyandforcehead": (
                "DatasetSpecificMoEWrapper",
                {
                    "head_cls": "MLP_EFS_Head",
                    "head_kwargs": {"wrap_property": False},
                    "dataset_mapping": BB["dataset_mapping"],
                },
            )
        },
        head="ds_moe",
    ),
    "head_ds_moe_mapping": case(
        "DatasetSpecificMoEWrapper with a mapping that is not the identity",
        {"dataset_mapping": MAP_NONID},
        heads={
            "energyandforcehead": (
                "DatasetSpecificMoEWrapper",
                {
                    "head_cls": "MLP_EFS_Head",
                    "head_kwargs": {"wrap_property": False},
                    "dataset_mapping": MAP_NONID,
                },
            )
        },
        head="ds_moe",
    ),
    "head_ds_single": case(
        "DatasetSpecificSingleHeadWrapper, no experts",
        {},
        heads={
            "energyandforcehead": (
                "DatasetSpecificSingleHeadWrapper",
                {
                    "head_cls": "MLP_EFS_Head",
                    "head_kwargs": {"wrap_property": False},
                    "dataset_names": ["omol", "omat", "oc20"],
                },
            )
        },
        head="ds_single",
    ),
    "direct_l3m2": case(
        "direct energy, force and stress heads, lmax 3",
        dict(FLAT, lmax=3, mmax=2),
        heads=DIRECT,
        head="direct",
        fd=False,
    ),
    "direct_l2m2_grid": case(
        "direct heads, grid feed-forward, stress reduce sum",
        dict(FLAT, ff_type="grid"),
        heads=dict(DIRECT, stress=("MLP_Stress_Head", {"reduce": "sum"}), energy=("Linear_Energy_Head", {})),
        head="direct",
        fd=False,
    ),
    "direct_l1m1_nostress": case(
        "direct energy and forces, lmax 1",
        dict(FLAT, lmax=1, mmax=1),
        heads={"energy": ("MLP_Energy_Head", {}), "forces": ("Linear_Force_Head", {})},
        head="direct",
        fd=False,
    ),
    "moe_direct": case(
        "experts with direct heads", dict(FLAT), moe=moe_kw(), heads=DIRECT, head="direct", fd=False
    ),
    "hessian": case("Hessian of two systems", {"regress_hessian": True, "hessian_vmap": False}, batch=False),
    # boundary cases
    "always_use_pbc": case(
        "always_use_pbc True (upstream ignores it)", {"always_use_pbc": True}, systems=boxed_molecules
    ),
    "single_atoms": case(
        "isolated atoms, with charge, in a large periodic box", {}, systems=with_single_atoms
    ),
    "normalized": case("energy, force and stress normaliser and element references", {}, norm=True),
}
