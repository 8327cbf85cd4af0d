import copy

import pytest
import torch
from torch.testing import assert_close

from gnnmd.graph import AtomBatch
from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.escn_md import EscnMD, EscnMDConfig, ExpertsConfig
from tests.models.conformance import Conformance, rotation
from tests.models.systems import crystal, ethanol, moved, predict, randomised, slab

SMALL = {
    "channels": 8,
    "hidden_channels": 6,
    "edge_channels": 8,
    "num_basis": 8,
    "r_cut": 4.5,
    "max_number": 60,
}


def escn_md(heads: str = "conservative", **model):
    """Return a small float64 potential with random weights everywhere."""
    torch.manual_seed(0)
    config = PotentialConfig(model=EscnMDConfig(**{**SMALL, **model}), heads=heads)
    potential = randomised(build_potential(config).double().eval())
    potential.energy_scale.fill_(5.0)
    return potential


class TestConservative(Conformance):
    @pytest.fixture
    def potential(self):
        return escn_md()


class TestExpertsAndBalancedChannels(Conformance):
    @pytest.fixture
    def potential(self):
        return escn_md(
            **{
                "lmax": 3,
                "mmax": 2,
                "num_layers": 1,
                "norm": "layer_norm",
                "charge_spin_embedding": "pos_emb",
            },
            experts=ExpertsConfig(count=3),
            charge_balanced_channels=(1, 2),
            spin_balanced_channels=(3,),
        )


class TestDirect(Conformance):
    conservative = False

    @pytest.fixture
    def potential(self):
        return escn_md(heads="direct", mmax=1, norm="layer_norm_sh")


def test_handedness_matters():
    """The published network knows left from right; a mirror image has another energy."""
    potential, batch = escn_md(), AtomBatch.from_ase(ethanol())
    mirror = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    image = predict(potential, moved(batch, batch.positions @ mirror))
    assert abs(image.energy - predict(potential, batch).energy) > 1e-6


@pytest.mark.parametrize(
    ("model", "tolerance"),
    [
        ({"feed_forward": "grid"}, 1e-4),
        ({"feed_forward": "grid", "grid_resolution": 14}, 1e-8),
        ({"activation": "s2"}, 1e-2),
        ({"activation": "s2", "grid_resolution": 20}, 1e-7),
    ],
)
def test_a_finer_grid_is_equivariant(model, tolerance):
    potential, batch, r = escn_md(**model), AtomBatch.from_ase(ethanol()), rotation(3)
    expected, found = predict(potential, batch), predict(potential, moved(batch, batch.positions @ r.T))
    assert_close(found.forces, expected.forces @ r.T, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "model", [{"lmax": 0, "mmax": 0}, {"lmax": 4, "mmax": 0}, {"lmax": 6, "mmax": 6}, {"num_layers": 0}]
)
def test_extreme_shapes_differentiate(model):
    batch = AtomBatch.from_ase(slab())
    potential = escn_md(**{"channels": 4, "hidden_channels": 4, **model})
    forces, h = predict(potential, batch).forces, 1e-4
    step = torch.zeros_like(batch.positions)
    step[4, 1] = h
    up, down = (predict(potential, moved(batch, batch.positions + s)).energy for s in (step, -step))
    assert_close(-(up - down)[0] / (2 * h), forces[4, 1], rtol=0, atol=1e-7)


def test_balanced_channels_sum_to_charge_and_spin():
    """After the last layer the chosen channels add up to the charge and to 2S of their system."""
    potential = escn_md(charge_balanced_channels=(0, 1), spin_balanced_channels=(5,))
    found = []
    potential.backbone.norm.register_forward_pre_hook(lambda _, args: found.append(args[0][:, 0]))
    predict(potential, [ethanol(), crystal()])
    n = len(ethanol())
    for rows, charge, unpaired in [(slice(n), 1.0, 1.0), (slice(n, None), 0.0, -1.0)]:
        total = found[0][rows].sum(0)
        assert_close(total[[0, 1, 5]], torch.tensor([charge, charge, unpaired], dtype=torch.float64))
        assert abs(total[2] - charge) > 1e-3


def test_charge_and_spin_change_the_energy():
    potential, atoms = escn_md(), ethanol()
    energies = set()
    for charge, spin in [(0, 0), (1, 0), (-1, 0), (0, 1), (0, 3)]:
        atoms.info.update(charge=charge, spin=spin)
        energies.add(float(predict(potential, atoms).energy))
    assert len(energies) == 5


def test_experts_are_mixed_per_system():
    """Each system of a batch uses its own mixture, in layers of edges and of atoms."""
    potential = escn_md(experts=ExpertsConfig(count=4, where="all"), feed_forward="grid")
    systems = [crystal(), ethanol(), slab()]
    together = predict(potential, systems)
    assert_close(together.energy, torch.cat([predict(potential, s).energy for s in systems]))
    mixtures = []
    potential.backbone.router.register_forward_hook(lambda _, __, out: mixtures.append(out))
    predict(potential, systems)
    assert (mixtures[0][0] - mixtures[0][1]).abs().max() > 1e-6


def test_pieces_for_the_cache_change_nothing(monkeypatch):
    """On a CPU edges are processed in pieces that fit its caches."""
    potential, batch = escn_md(), AtomBatch.from_ase([crystal(), slab()])
    whole = predict(potential, batch)
    monkeypatch.setattr("gnnmd.models.escn_md.CACHE_VALUES", 100 * 9 * 8)
    pieces = []
    convolution = potential.backbone.blocks[1].edge_convolution
    messages = convolution.messages
    monkeypatch.setattr(convolution, "messages", lambda *args: pieces.append(1) or messages(*args))
    cut = predict(potential, batch)
    assert len(pieces) > 1
    assert_close(cut.energy, whole.energy, rtol=0, atol=1e-12)
    assert_close(cut.forces, whole.forces, rtol=0, atol=1e-12)


def test_frozen_embeddings_are_not_trained():
    potential = escn_md(freeze_charge_spin=True)
    trained = {name for name, p in potential.named_parameters() if p.requires_grad}
    assert not any("system_embedding.charge" in name or "system_embedding.spin" in name for name in trained)
    assert any("system_embedding.mix" in name for name in trained)


def test_bfloat16_training_step_runs():
    """Mixed precision keeps geometry, heads and sums in full precision."""
    model = copy.deepcopy(escn_md()).float().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        p = predict(model, [crystal(), slab()])
        loss = p.forces.square().mean() + p.energy.square().mean()
    loss.backward()
    assert all(w.grad.isfinite().all() for w in model.parameters() if w.grad is not None)
    exact = predict(copy.deepcopy(model).eval(), [crystal(), slab()])
    assert_close(p.forces.detach(), exact.forces, rtol=0, atol=0.1 * float(exact.forces.abs().max()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mmax": 3}, "mmax=3 must lie in 0..lmax=2"),
        ({"norm": "batch"}, "norm='batch' is not known; use one of rms_norm_sh"),
        ({"channels": 7}, "channels=7 must be even"),
        ({"num_basis": 1}, "num_basis=1"),
        ({"grid_resolution": 5}, "grid_resolution=5 must be even and at least 6"),
        ({"charge_balanced_channels": (64,)}, r"balanced channels \(64,\) must lie in 0..63"),
        ({"experts": ExpertsConfig(layers=(2,))}, r"experts.layers=\(2,\) must lie in 0..1"),
    ],
)
def test_a_wrong_shape_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        EscnMDConfig(**change)


def test_weights_do_not_depend_on_the_tables():
    """Constants are no part of the state dict: it holds parameters and float64 buffers."""
    backbone = EscnMD(EscnMDConfig(**SMALL))
    assert set(backbone.state_dict()) == {name for name, _ in backbone.named_parameters()}


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it, and hides the warning itself
def test_one_compiled_network_serves_structures_of_every_size():
    torch.compiler.reset()
    plain, compiled = escn_md(), escn_md()
    compiled.backbone.compile(dynamic=True, backend="eager")
    try:
        for atoms in (crystal(), crystal() * (3, 1, 1), ethanol(), slab()):
            found, expected = predict(compiled, atoms), predict(plain, atoms)
            assert_close(found.forces, expected.forces, rtol=0, atol=1e-12)
            torch.compiler.set_stance("fail_on_recompile")
    finally:
        torch.compiler.set_stance("default")
