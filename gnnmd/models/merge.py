"""A mixture of experts merged into plain weights for one kind of system."""

from dataclasses import replace

import torch

from gnnmd.graph import AtomBatch, NeighborList
from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.escn_md import EscnMD, EscnMDConfig
from gnnmd.models.potential import MergedFor, Potential
from gnnmd.nn.experts import ExpertLinear


def merged(potential: Potential, batch: AtomBatch) -> Potential:
    """Return a potential without experts that is the same function for systems like the one given.

    Experts are mixed by composition, charge, spin and data set only, so in a simulation, where these stay,
    their weights can be mixed once. The result refuses systems for which the mixture would be another one.

    Args:
        potential: with a mixture of linear experts, built by `build_potential`.
        batch: one system.

    Raises:
        ValueError: no experts, or not one system.
    """
    config: PotentialConfig = potential.config
    model = config and config.model
    if not isinstance(model, EscnMDConfig) or model.experts is None:
        raise ValueError("this potential has no mixture of experts to merge")
    if batch.n_systems != 1:
        raise ValueError(f"experts are merged for one system, but the batch holds {batch.n_systems}")
    index = torch.zeros(2, 0, dtype=torch.int64, device=batch.numbers.device)
    g = potential.graph(batch, NeighborList(index, index.new_zeros(0, 3), potential.r_cut))
    experts = model.experts
    composition = "reduced" if experts.composition else "any"
    if experts.composition and experts.mean_counts_one_more:
        composition = "exact"
    plain = build_potential(
        replace(
            config,
            model=replace(model, experts=None),
            merged_for=MergedFor.of(batch, 0, potential.dataset_name(batch.dataset[0]), composition),
        )
    )
    with torch.no_grad():
        backbone = potential.backbone
        assert isinstance(backbone, EscnMD)
        system = backbone.system_embedding(g.charge, g.spin, g.dataset)
        coefficients = backbone.coefficients(g, len(g.numbers), system, lambda x: x.sum(0, keepdim=True))
        assert coefficients is not None
        mix = coefficients[0]  # [K]
        state = potential.state_dict()
        for name, module in backbone.named_modules(prefix="backbone"):
            if isinstance(module, ExpertLinear) and module.weight.ndim == 3:
                state[f"{name}.weight"] = torch.einsum("k,koi->oi", mix, module.weight)
    kept = {key: value for key, value in state.items() if not key.startswith("backbone.router.")}
    parameter = next(potential.parameters())
    plain.to(parameter.device, parameter.dtype).load_state_dict(kept)
    return plain.train(potential.training)
