import pytest
import torch
from torch.testing import assert_close

from gnnmd.nn.resnet_mlp import ResidualLayer, ResNetMLP, dense


@pytest.mark.parametrize(("n_out", "copies"), [(3, 1), (6, 2), (4, 0), (9, 0)])
@pytest.mark.parametrize("scaled", [True, False])
def test_the_input_is_added_where_the_widths_fit(n_out, copies, scaled):
    torch.manual_seed(0)
    layer, x = ResidualLayer(3, n_out, torch.tanh, scaled=scaled), torch.randn(5, 3)
    y = torch.tanh(x @ layer.linear.weight.T + layer.linear.bias)
    assert (layer.idt is not None) == (scaled and copies > 0)
    if layer.idt is not None:
        assert 0.09 < layer.idt.min() < layer.idt.max() < 0.11
        y = y * layer.idt
    expected = y + torch.cat([x] * copies, dim=1) if copies else y
    assert_close(layer(x), expected)


def test_layers_in_a_row():
    torch.manual_seed(0)
    network, x = ResNetMLP([2, 4, 4, 5], torch.tanh, scaled=True), torch.randn(3, 7, 2)
    y = x
    for layer in network.layers:
        y = layer(y)
    assert_close(network(x), y)
    assert [layer.copies for layer in network.layers] == [2, 1, 0]
    assert ResNetMLP([4], torch.tanh)(x) is x


def test_spread_of_fresh_weights():
    torch.manual_seed(0)
    layer = dense(300, 100)
    assert layer.weight.std().item() == pytest.approx(400**-0.5, rel=0.02)
    assert layer.bias.std().item() == pytest.approx(1.0, rel=0.2)
    assert dense(2, 3, bias=False).bias is None
