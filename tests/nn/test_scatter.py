import torch
from torch.testing import assert_close

from gnnmd.nn.scatter import rotated_rows


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    index = torch.tensor([0, 2, 2, 1, 0])
    rotation = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    return rotation, torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True), index


def test_gathered_and_rotated():
    rotation, h, index = inputs()
    assert_close(rotated_rows(rotation, h, index), rotation @ h[index])


def test_derivatives():
    assert torch.autograd.gradcheck(rotated_rows, inputs())
    assert torch.autograd.gradgradcheck(rotated_rows, inputs())


def test_gathered_rows_are_not_kept():
    rotation, h, index = inputs()
    y = rotated_rows(rotation, h, index)
    assert {t.shape for t in y.grad_fn.saved_tensors} == {rotation.shape, h.shape, index.shape}
