import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gnnmd.training.muon import Muon, orthogonalised
from gnnmd.training.optim import OptimConfig, build_optimizer, parameter_groups

MUON = OptimConfig(kind="muon", lr=0.02, weight_decay=0.1)


class Stack(nn.Module):
    """Three maps in one parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 4))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Embedding(5, 4), nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 6, bias=False), Stack()
    return nn.Sequential(*layers, nn.LayerNorm(6), nn.Linear(6, 1)).double()


def give_gradients(net: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (2, 3, 6, 4), (1, 7)])
def test_singular_values_become_one_and_their_vectors_stay(shape):
    x = 1e-3 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    turned = u.mT @ orthogonalised(x) @ vt.mT
    values = turned.diagonal(dim1=-2, dim2=-1)
    assert_close(turned, torch.diag_embed(values), rtol=0, atol=1e-12)
    assert values.min() > 0.65
    assert values.max() < 1.25
    assert (s.amax(-1) / s.amin(-1)).max() < 100  # not smaller than the polynomial lifts to one


def test_no_gradient_is_no_direction():
    assert orthogonalised(torch.zeros(3, 4)).eq(0).all()


def test_matrices_move_as_with_the_optimiser_of_torch():
    """Which computes the iteration in bfloat16."""
    net, reference = network(), network()
    (*_, ours), theirs = parameter_groups(net, MUON), parameter_groups(reference, MUON)[-1]
    matrices = [p for p in theirs["params"] if p.ndim == 2]
    assert len(matrices) == 3
    mine = build_optimizer(net, MUON, 1)[0]
    mine.param_groups[2]["lr"] = MUON.lr
    torchs = torch.optim.Muon(
        matrices, lr=MUON.lr, weight_decay=MUON.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    before = copy.deepcopy(matrices)
    for step in range(3):
        give_gradients(net, step)
        give_gradients(reference, step)
        mine.step()
        torchs.step()
    found = [p for p in ours["params"] if p.ndim == 2]
    for a, b, start in zip(found, matrices, before, strict=True):
        assert (b - start).abs().max() > 0.01
        assert_close(a, b, rtol=0, atol=5e-4)


def test_stacks_are_handled_matrix_by_matrix():
    net, single = network(), nn.ParameterList(network()[4].weight.detach().unbind())
    group = {"weight_decay": 0.1, "muon": True}
    mine, apart = (Muon([{"params": ps, **group}], lr=0.02) for ps in ([net[4].weight], list(single)))
    give_gradients(net, 0)
    for p, g in zip(single, net[4].weight.grad, strict=True):
        p.grad = g.clone()
    mine.step()
    apart.step()
    assert_close(net[4].weight.detach(), torch.stack([p.detach() for p in single]))


def test_everything_else_moves_as_with_adamw():
    net, reference = network(), network()
    mine, adamw = build_optimizer(net, MUON, 1)[0], torch.optim.AdamW(parameter_groups(reference, MUON)[:2])
    for group in (*mine.param_groups, *adamw.param_groups):
        group["lr"], group["betas"] = 0.02, (0.9, 0.999)
    for step in range(3):
        give_gradients(net, step)
        give_gradients(reference, step)
        mine.step()
        adamw.step()
    same = [torch.equal(a, b) for a, b in zip(net.parameters(), reference.parameters(), strict=True)]
    names = [name for (name, _), s in zip(net.named_parameters(), same, strict=True) if not s]
    assert names == ["1.weight", "2.weight", "3.weight", "4.weight"]


def test_a_saved_state_goes_on_where_it_stopped():
    whole, part = network(), network()
    first = build_optimizer(whole, MUON, 10)[0]
    before = build_optimizer(part, MUON, 10)[0]
    for step in range(4):
        give_gradients(whole, step)
        first.step()
    for step in range(2):
        give_gradients(part, step)
        before.step()
    after = build_optimizer(part, MUON, 10)[0]
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    for step in range(2, 4):
        give_gradients(part, step)
        after.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), part.parameters(), strict=True))


def test_parameters_without_a_gradient_stay():
    net = network()
    optimizer = build_optimizer(net, MUON, 1)[0]
    before = copy.deepcopy(net)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters(), strict=True))


def test_tables_are_left_to_adamw_even_where_they_decay():
    *_, matrices = parameter_groups(network(), replace(MUON, decay_embeddings=True))
    assert [tuple(p.shape) for p in matrices["params"]] == [(6, 4), (4, 6), (6, 4), (3, 4, 4)]
