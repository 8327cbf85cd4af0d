import pytest
import torch
from scipy.spatial.transform import Rotation
from torch.nn import functional as F
from torch.testing import assert_close

from gnnmd.nn.norms import NORMS, DegreeNorm
from gnnmd.nn.so3 import degrees, m_major_rows
from gnnmd.nn.wigner import WignerD


def norm_of(kind: str, lmax: int = 3, channels: int = 5) -> DegreeNorm:
    torch.manual_seed(0)
    norm = DegreeNorm(kind, lmax, channels).double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-1, 1)
    return norm


def features() -> torch.Tensor:
    return 3 * torch.randn(6, 16, 5, dtype=torch.float64) + 1


@pytest.mark.parametrize("kind", NORMS)
def test_commutes_with_rotations(kind):
    norm, x = norm_of(kind), features()
    d = WignerD(3, 3)(torch.tensor(Rotation.random(6, random_state=1).as_matrix()))
    d = d[:, torch.argsort(torch.tensor(m_major_rows(3, 3)))]  # rows l-major, as the columns
    assert_close(norm(d @ x), d @ norm(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["layer_norm", "layer_norm_sh"])
def test_scalars_have_an_ordinary_layer_norm(kind):
    norm, x = norm_of(kind), features()
    assert_close(norm(x)[:, 0], F.layer_norm(x[:, 0], (5,), norm.weight[0], norm.bias, eps=1e-5))


@pytest.mark.parametrize("kind", NORMS)
def test_which_degrees_share_a_scale(kind):
    """Growing degree 2 changes others only where they share their scale."""
    norm, x = norm_of(kind), features()
    larger = x.clone()
    larger[:, 4:9] *= 10
    change = (norm(larger) - norm(x)).abs().amax(dim=(0, 2))
    changed = {l for l, c in zip(degrees(3), change, strict=True) if c > 1e-3 and l != 2}
    assert changed == {"layer_norm": set(), "rms_norm_sh": {0, 1, 3}, "layer_norm_sh": {1, 3}}[kind]


@pytest.mark.parametrize("kind", NORMS)
def test_unit_mean_power(kind):
    norm = DegreeNorm(kind, 3, 5).double()
    power = norm(features()).square().mean(dim=2)
    per_degree = torch.stack([p.mean(dim=1) for p in power.split([1, 3, 5, 7], dim=1)], dim=1)
    assert_close(per_degree.mean(dim=1), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-4)
