"""The gradient that training follows, on a real model in float64."""

from dataclasses import replace

import pytest
import torch
from ase.build import bulk, molecule
from torch_geometric.data import Batch

from gnnmd.data.dataset import AtomsDataset
from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.escn_md import EscnMDConfig
from gnnmd.parallel import GPContext
from gnnmd.training.losses import ForcesConfig, LossConfig, TermConfig, loss_sums, weighted_sum
from gnnmd.training.module import PotentialModule, labelled_graph
from gnnmd.training.optim import OptimConfig
from tests.training.conftest import crystals, labelled

# squares: finite differences of absolute values are wrong where an error changes sign
SMOOTH = LossConfig(TermConfig("mse"), ForcesConfig("mse"), TermConfig("mse"))


def potential_of(heads="conservative", lmax=1):
    torch.manual_seed(3)
    model = EscnMDConfig(
        r_cut=4.0,
        lmax=lmax,
        mmax=1,
        channels=4,
        hidden_channels=4,
        edge_channels=4,
        num_layers=2,
        num_basis=6,
    )
    return build_potential(PotentialConfig(model, heads)).double().train()


def batch_of(potential, images):
    dataset = AtomsDataset(images, potential.r_cut)
    return labelled_graph(potential, Batch.from_data_list([dataset[i] for i in range(len(dataset))]))


def mixed():
    return [labelled(bulk("Cu", cubic=True), 0), labelled(molecule("H2O"), 1, stress=False)]


def loss_of(potential, batch, config=SMOOTH):
    gp = GPContext.single(len(batch.labels.numbers))
    prediction = potential(batch.labels.positions, batch.graph, gp)
    weights = config.weights(0.0)
    sums = loss_sums(config, set(weights), prediction, batch.labels, batch.graph.n_atoms)
    return weighted_sum(sums, weights, gp)


@pytest.mark.parametrize(("heads", "lmax"), [("conservative", 1), ("direct", 2)])
def test_gradient_of_the_loss_by_every_parameter_agrees_with_finite_differences(heads, lmax):
    potential = potential_of(heads, lmax)
    batch = batch_of(potential, mixed())
    loss_of(potential, batch).backward()
    step, g = 1e-5, torch.Generator().manual_seed(0)
    untouched = []
    for name, parameter in potential.named_parameters():
        if parameter.grad is None or not parameter.grad.any():
            untouched.append(name)
            continue
        # along the gradient of this tensor plus noise: nonzero, and every entry takes part
        direction = parameter.grad / parameter.grad.norm() + 0.1 * torch.randn(
            parameter.shape, generator=g, dtype=torch.float64
        )
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * step * direction
            values.append(loss_of(potential, batch).item())
            with torch.no_grad():
                parameter -= sign * step * direction
        expected = (parameter.grad * direction).sum().item()
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(expected, rel=1e-4), name
    # unused: the scale of features that no later layer reads, tables of charges and spins that do not occur
    assert all("norm" in name or "linear_2" in name or "conv_2" in name for name in untouched), untouched


def test_a_molecule_beside_a_crystal_does_not_spoil_the_gradient():
    potential = potential_of()
    batch = batch_of(potential, mixed())
    assert batch.labels.stress.isnan().any(-1).any(-1).tolist() == [False, True]
    loss_of(potential, batch).backward()
    assert all(p.grad.isfinite().all() for p in potential.parameters() if p.grad is not None)


def test_a_missing_label_leaves_the_gradient_to_the_others():
    potential = potential_of()
    known, unknown = (labelled(bulk("Cu", cubic=True), seed) for seed in (0, 1))
    unknown.calc.results.pop("forces")
    unknown.calc.results.pop("stress")
    both = batch_of(potential, [known, unknown])
    assert both.labels.forces.isnan().all(1).sum() == 4
    forces_only = replace(SMOOTH, energy=TermConfig(weight=0.0))

    def gradient(batch):
        potential.zero_grad()
        loss_of(potential, batch, forces_only).backward()
        return [p.grad.clone() for p in potential.parameters() if p.grad is not None]

    for alone, beside in zip(gradient(batch_of(potential, [known])), gradient(both), strict=True):
        torch.testing.assert_close(beside, alone, rtol=1e-9, atol=1e-12)


def test_bfloat16_is_used_inside_the_backbone_and_nowhere_else():
    torch.manual_seed(0)
    potential = build_potential(PotentialConfig(EscnMDConfig(channels=8, hidden_channels=8, edge_channels=8)))
    module = PotentialModule(potential, LossConfig(), OptimConfig(), 10, autocast=torch.bfloat16)
    seen = {}
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear) or name.endswith(("energy", "norm")):
            layer.register_forward_hook(lambda m, i, out, name=name: seen.update({name: out.dtype}))
    batch = batch_of(potential, crystals("Cu", 1))
    module.train()
    prediction = module.potential(batch.labels.positions, batch.graph, GPContext.single(4))
    inside = {name for name, dtype in seen.items() if dtype == torch.bfloat16}
    assert inside
    assert all(name.startswith("potential.backbone") for name in inside)
    assert prediction.energy.dtype == prediction.forces.dtype == prediction.stress.dtype == torch.float64
    assert seen["potential.heads.energy"] == torch.float32
    seen.clear()
    module.average(batch.labels.positions, batch.graph, GPContext.single(4))
    assert torch.bfloat16 not in seen.values()


def test_training_mode_never_reaches_the_average():
    module = PotentialModule(potential_of(), LossConfig(), OptimConfig(), 10)
    module.train()
    assert module.potential.training
    assert not any(m.training for m in module.average.modules())
    assert not any(p.requires_grad for p in module.average.parameters())
