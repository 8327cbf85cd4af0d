"""A mixture of experts merged into plain weights for one kind of system."""

from dataclasses import replace

import torch

from gnnmd.graph import AtomBatch, NeighborList
from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.escn_md import EscnMD, EscnMDConfig, ExpertsConfig
from gnnmd.models.potential import MergedFor, Potential
from gnnmd.nn.experts import ExpertLinear


def merged(potential: Potential, batch: AtomBatch) -> Potential:
    """Return a potential without experts that is the same function for systems like the one given.

    Experts are mixed by composition, charge, spin and data set only, so in a simulation, where these stay,
    their weights can be mixed once. The result refuses systems for which the mixture would be another one;
    `InferenceSettings.merge_experts` merges again instead.

    Args:
        potential: with a mixture of linear experts, built by `build_potential`.
        batch: one system.

    Raises:
        ValueError: no experts, or not one system.
    """
    if not has_experts(potential):
        raise ValueError("this potential has no mixture of experts to merge")
    if batch.n_systems != 1:
        raise ValueError(f"experts are merged for one system, but the batch holds {batch.n_systems}")
    index = torch.zeros(2, 0, dtype=torch.int64, device=batch.numbers.device)
    g = potential.graph(batch, NeighborList(index, index.new_zeros(0, 3), potential.r_cut))
    mixture = mixture_of(potential, batch)
    assert mixture is not None
    config: PotentialConfig = potential.config
    assert isinstance(config.model, EscnMDConfig)
    with torch.random.fork_rng(devices=[]):  # fresh weights are drawn, and then overwritten
        plain = build_potential(
            replace(config, model=replace(config.model, experts=None), merged_for=mixture)
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


def has_experts(potential: Potential) -> bool:
    """Tell whether there is a mixture of experts that can be merged."""
    return _experts(potential) is not None


def mixture_of(potential: Potential, batch: AtomBatch) -> MergedFor | None:
    """Return what the mixture of the systems of a batch follows from; None if there is more than one.

    Published p-norm coefficients depend on the number of systems in a call (`nn.experts.Router`), so that
    only a lone system has the mixture that merged weights hold.

    Raises:
        ValueError: a data set that the model does not know.
    """
    experts = _experts(potential)
    assert experts is not None
    if experts.norm == "pnorm" and batch.n_systems > 1:
        return None
    composition = "any"
    if experts.composition:
        composition = "exact" if experts.mean_counts_one_more else "reduced"
    found: MergedFor | None = None
    for b, name in enumerate(batch.dataset):
        mixture = MergedFor.of(batch, b, potential.dataset_name(name), composition)
        if found is not None and mixture != found:
            return None
        found = mixture
    return found


def _experts(potential: Potential) -> ExpertsConfig | None:
    model = potential.config and potential.config.model
    return model.experts if isinstance(model, EscnMDConfig) else None
