import pytest
import torch
from torch.testing import assert_close

from gnnmd.nn.experts import ExpertLinear, Router, Routing


def test_weights_are_mixed_and_the_bias_is_not():
    torch.manual_seed(0)
    layer = ExpertLinear(3, 2, experts=4)
    coefficients, x = torch.rand(2, 4), torch.randn(5, 3)
    found = layer(x, Routing.of(coefficients, torch.tensor([0, 0, 0, 1, 1])))
    each = x @ layer.weight.mT  # [K, 5, 2]
    system = torch.tensor([0, 0, 0, 1, 1])
    assert_close(found, torch.einsum("nk,knc->nc", coefficients[system], each) + layer.bias)


def test_a_system_without_rows():
    layer, system = ExpertLinear(3, 2, experts=2), torch.tensor([0, 0, 2])
    assert layer(torch.randn(3, 3), Routing.of(torch.rand(3, 2), system)).shape == (3, 2)


def test_plain_layers_read_no_routing():
    torch.manual_seed(0)
    layer, x = ExpertLinear(3, 2), torch.randn(5, 3)
    assert_close(layer(x, None), torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_softmax_coefficients_have_a_floor():
    router = Router(4, 3, "softmax", None, 0.0)
    found = router(torch.randn(2, 4), None)
    assert_close(found.sum(dim=1), torch.full((2,), 1 + 3 * 0.005))


def test_pnorm_coefficients_depend_on_the_batch():
    """As published: the floor is two over the number of systems."""
    torch.manual_seed(0)
    router, x = Router(4, 3, "pnorm", None, 0.0), torch.randn(4, 4)
    together, alone = router(x, None), router(x[:1], None)
    assert_close(together.sum(dim=1), torch.ones(4))
    assert (together[0] - alone[0]).abs().max() > 1e-4


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    router, x = Router(4, 3, "softmax", None, 0.5), torch.randn(2, 4)
    assert not torch.equal(router(x, None), router(x, None))
    router.eval()
    assert torch.equal(router(x, None), router(x, None))


def test_composition_is_an_input():
    router, x = Router(4, 3, "softmax", 10, 0.0), torch.randn(2, 4)
    assert router.composition.weight.shape == (11, 4)
    assert not torch.equal(router(x, torch.zeros(2, 4)), router(x, torch.ones(2, 4)))


def test_forgotten_routing_is_noticed():
    with pytest.raises(AssertionError, match="needs their coefficients"):
        ExpertLinear(3, 2, experts=2)(torch.randn(5, 3), None)
