import gc
from weakref import WeakSet

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gnnmd.nn.recompute import recomputed


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1)).double()


def force_loss(model: nn.Module, x: torch.Tensor, again: bool) -> torch.Tensor:
    def energy(y: torch.Tensor, scale: torch.Tensor, unused: torch.Tensor) -> tuple[torch.Tensor]:
        return (scale * model(y),)

    scale = torch.tensor(2.0, dtype=torch.float64)
    inputs = (x, scale, torch.arange(3))
    (value,) = recomputed(energy, inputs, list(model.parameters())) if again else energy(*inputs)
    (force,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    return force.square().sum() + value.sum()


def test_first_and_second_derivatives_are_the_same():
    results = []
    for again in (False, True):
        model, x = network(), torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3).requires_grad_()
        loss = force_loss(model, x, again)
        loss.backward()
        results.append([loss, x.grad, *(p.grad for p in model.parameters())])
    for direct, again in zip(*results, strict=True):
        assert_close(again, direct)


def test_third_derivative():
    x = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    (y,) = recomputed(lambda t: (t.sin(),), (x,))
    for _ in range(3):
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert_close(y, -x.cos())


class _Saved:
    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


@pytest.mark.parametrize("again", [True, False])
def test_nothing_but_inputs_is_kept(again):
    """Also with a recorded first derivative; control: the plain function keeps its intermediates."""
    kept = WeakSet()

    def pack(t: torch.Tensor) -> _Saved:
        saved = _Saved(t)
        kept.add(saved)
        return saved

    def wide(t: torch.Tensor) -> tuple[torch.Tensor]:
        return ((t[:, None] * torch.ones(1, 1000, dtype=t.dtype)).sin().exp().sum(1),)

    x = torch.randn(10, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        (y,) = recomputed(wide, (x,)) if again else wide(x)
        force = torch.autograd.grad(y.sum(), x, create_graph=True)
    gc.collect()
    assert force[0].requires_grad
    assert (max(saved.tensor.numel() for saved in kept) < 1000) == again


def test_same_precision_in_the_second_run():
    model, x = network().float(), torch.randn(4, 3, requires_grad=True)
    dtypes = []

    def observed(y: torch.Tensor) -> tuple[torch.Tensor]:
        z = model(y)
        dtypes.append(z.dtype)
        return (z.float(),)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        (y,) = recomputed(observed, (x,), list(model.parameters()))
    y.sum().backward()
    assert dtypes == [torch.bfloat16, torch.bfloat16]
