import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from gnnmd.nn.activations import activation, silut


@pytest.mark.parametrize("threshold", [0.5, 3.0, 10.0])
def test_silut_by_its_definition(threshold):
    x = torch.linspace(-5, 30, 701, dtype=torch.float64)
    t = torch.tensor(threshold, dtype=torch.float64)
    s = t.sigmoid() + t * t.sigmoid() * (1 - t.sigmoid())
    expected = torch.where(x < t, x * x.sigmoid(), torch.tanh(s * (x - t)) + t * t.sigmoid())
    assert_close(activation(f"silut:{threshold}")(x), expected)
    assert_close(silut(x[x < t], threshold), F.silu(x[x < t]), rtol=0, atol=0)


def test_silut_has_a_continuous_slope():
    x = torch.tensor([3 - 1e-7, 3 + 1e-7], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(silut(x, 3.0).sum(), x)
    assert_close(slope[0], slope[1], rtol=0, atol=1e-6)
    torch.autograd.gradgradcheck(lambda y: silut(y, 3.0), x.detach().mul(1.3).requires_grad_())


def test_names():
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    for name in ("Linear", "none", "linear"):
        assert activation(name)(x) is x
    assert_close(activation("tanh")(x), x.tanh())
    assert_close(activation("gelu")(x), F.gelu(x, approximate="tanh"))
    assert_close(activation("silut")(x * 2), silut(x * 2, 3.0))
    assert (activation("gelu")(x) - F.gelu(x)).abs().max() > 1e-5


@pytest.mark.parametrize("name", ["swish", "tanh:3", "silut:x", "silut:-1", "silut:inf", ""])
def test_what_is_not_known_is_refused(name):
    with pytest.raises(ValueError, match="activation"):
        activation(name)
