import pytest
import torch
from torch.testing import assert_close

from gnnmd.nn.switch import exp_switch, poly_switch

R = torch.linspace(0.5, 8.0, 400, dtype=torch.float64)


def test_values():
    at = torch.tensor([1.0, 5.0, 5.5, 6.0, 7.0], dtype=torch.float64)
    assert_close(poly_switch(at, 5.0, 6.0), torch.tensor([1, 1, 0.5, 0, 0], dtype=torch.float64))
    value = torch.exp(-torch.exp(torch.tensor(20 * 0.2 / 5.3, dtype=torch.float64)))
    assert_close(exp_switch(at, 5.3, 6.0)[2], value)
    assert exp_switch(at[3:], 5.3, 6.0).abs().max() == 0


def test_the_exponential_switch_is_not_zero_at_the_cutoff():
    near = torch.tensor([6.0, 4.0], dtype=torch.float64) - 1e-9
    assert exp_switch(near[:1], 5.3, 6.0).item() == pytest.approx(8.1e-7, rel=0.01)
    assert exp_switch(near[1:], 3.5, 4.0).item() == pytest.approx(2.7e-8, rel=0.02)


@pytest.mark.parametrize("switch", [poly_switch, exp_switch])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_monotonous_and_finite_with_its_derivatives(switch, dtype):
    r = torch.cat([R, torch.tensor([104.0, 1e4], dtype=torch.float64)]).to(dtype).requires_grad_()
    s = switch(r, 3.5, 6.0)
    assert (s.diff() <= 0).all()
    assert s[0].item() == pytest.approx(1.0, abs=1e-6)
    (slope,) = torch.autograd.grad(s.sum(), r, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), r)
    assert slope.isfinite().all()
    assert curvature.isfinite().all()
    assert slope[r > 6.0].abs().max() == curvature[r > 6.0].abs().max() == 0


def test_two_derivatives_of_the_polynomial_are_continuous():
    for edge in (5.0, 6.0):
        r = torch.tensor([edge - 1e-6, edge + 1e-6], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(poly_switch(r, 5.0, 6.0).sum(), r, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), r)
        assert slope.abs().max() < 1e-9
        assert curvature.abs().max() < 1e-3
