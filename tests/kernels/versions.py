"""How two versions of an operation are compared, on a GPU or in Triton's interpreter (TRITON_INTERPRET=1)."""

import os

import pytest
import torch
from torch import Tensor
from torch.autograd import grad
from torch.testing import assert_close

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device or TRITON_INTERPRET=1"
    ),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),  # of NumPy
]
TYPES = [torch.float64, torch.float32]


class Random:
    """Reproducible numbers."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return a leaf that is differentiated by."""
        values = torch.randn(*shape, dtype=torch.float64, generator=self.generator)
        return values.to(DEVICE, dtype).requires_grad_()

    def below(self, n: int, size: int) -> Tensor:
        """Return whole numbers from 0 to n - 1."""
        return torch.randint(0, n, (size,), generator=self.generator).to(DEVICE)


def same(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Compare results, and gradients by the inputs for a random cotangent, to rounding of the largest."""
    g = Random(0).normal(*expected.shape, dtype=expected.dtype).detach()
    gradients = grad(found, inputs, g), grad(expected, inputs, g)
    for a, b in zip((found, *gradients[0]), (expected, *gradients[1]), strict=True):
        largest = float(b.detach().abs().max()) if b.numel() else 0.0
        digits = {torch.float64: 1e-13, torch.float32: 3e-6}[b.dtype]
        assert_close(a, b, rtol=0, atol=digits * max(largest, 1.0))
