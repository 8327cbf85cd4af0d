import torch
from torch.testing import assert_close

from gnnmd.nn.radial import GaussianBasis, envelope


def test_envelope_is_smooth_at_the_cutoff():
    """1 at zero; value, slope and curvature vanish at the cutoff, and everything beyond is zero."""
    r = torch.tensor([0.0, 3.0, 6.0 - 1e-9, 6.0, 6.5], dtype=torch.float64, requires_grad=True)
    value = envelope(r, 6.0)
    (slope,) = torch.autograd.grad(value.sum(), r, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), r)
    assert value[0] == 1
    assert 0 < value[1] < 1
    for x in (value, slope, curvature):
        assert x[2:4].abs().max() < 1e-6
        assert x[4] == 0
    inner = torch.linspace(0.1, 5.9, 50, dtype=torch.float64)
    assert (envelope(inner, 6.0).diff() < 0).all()


def test_gaussians_peak_at_their_centres():
    basis = GaussianBasis(5.0, 11)
    assert_close(basis(basis.centres).diagonal(), torch.ones(11, dtype=torch.float64))
    spacing = torch.tensor([0.5], dtype=torch.float64)
    assert_close(basis(spacing)[0, 0], torch.exp(torch.tensor(-0.125, dtype=torch.float64)))
    assert basis.float().centres.dtype == torch.float64
    assert basis(spacing.float()).dtype == torch.float32
