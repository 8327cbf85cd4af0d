import torch
from torch.testing import assert_close

from gnnmd.nn.split_linear import SplitLinear


def test_the_parts_add_up_to_the_whole():
    torch.manual_seed(0)
    layer = SplitLinear([2, 3, 4], 5)
    parts = [torch.randn(6, width) for width in (2, 3, 4)]
    summed = sum(layer.part(k, x, bias=k == 1) for k, x in enumerate(parts))
    whole = layer.linear(torch.cat(parts, dim=1))
    assert_close(summed, whole)
    two = layer.part(0, parts[0], bias=True) + layer.part(1, parts[1])
    assert_close(layer.add_part(2, parts[2], two.clone()), whole)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(layer.add_part(2, parts[2], two.bfloat16()), whole.bfloat16(), rtol=0.1, atol=0.1)
