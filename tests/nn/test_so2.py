import pytest
import torch
from torch.testing import assert_close

from gnnmd.nn.edge_operations import EdgeOperations
from gnnmd.nn.experts import Routing
from gnnmd.nn.so2 import SO2Linear, rows_per_order


def features(lmax: int, mmax: int, c: int, e: int = 7) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(e, n * c, dtype=torch.float64) for n in rows_per_order(lmax, mmax)]


def rolled(x: list[torch.Tensor], angle: float) -> list[torch.Tensor]:
    """Rotate about the edge: order m turns by m times the angle."""
    result = [x[0]]
    for m, xm in enumerate(x[1:], start=1):
        phase = torch.tensor(m * angle, dtype=torch.float64)
        plus, minus = xm.chunk(2, dim=1)
        turned = [phase.cos() * plus - phase.sin() * minus, phase.sin() * plus + phase.cos() * minus]
        result.append(torch.cat(turned, dim=1))
    return result


@pytest.mark.parametrize(("lmax", "mmax"), [(0, 0), (2, 2), (3, 1), (4, 0)])
def test_commutes_with_rolls_about_the_edge(lmax, mmax):
    linear, x = SO2Linear(lmax, mmax, 3, 4, extra=lmax * 4).double(), features(lmax, mmax, 3)

    def gate(y: list[torch.Tensor]) -> list[torch.Tensor]:
        return EdgeOperations().gated(y, lmax, 4)

    found, expected = gate(linear(rolled(x, 0.7), None)), rolled(gate(linear(x, None)), 0.7)
    assert [y.shape[1] for y in found] == [4 * n for n in rows_per_order(lmax, mmax)]
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, rtol=0, atol=1e-12)


def test_orders_are_multiplied_as_complex_numbers():
    linear, x = SO2Linear(2, 2, 3, 4).double(), features(2, 2, 3)
    real, imaginary = linear.m[0].weight.chunk(2)
    weight = torch.complex(real, imaginary)
    product = torch.complex(*x[1].chunk(2, dim=1)) @ weight.T
    assert_close(linear(x, None)[1], torch.cat([product.real, product.imag], dim=1), rtol=0, atol=1e-13)


def test_each_system_has_its_mixture():
    coefficients = torch.rand(2, 3, dtype=torch.float64)
    linear = SO2Linear(2, 1, 3, 4, experts_m0=3, experts_m=3).double()
    x = features(2, 1, 3)
    together = linear(x, Routing(coefficients, [3, 4]))
    for b, rows in enumerate((slice(3), slice(3, 7))):
        alone = linear([xm[rows] for xm in x], Routing(coefficients[b : b + 1], None))
        for a, c in zip(alone, together, strict=True):
            assert_close(a, c[rows])


def test_gate_opens_and_closes_degrees():
    """Gates far below zero leave scalars only; far above they let everything pass."""
    y = [torch.randn(5, 2 * 4 + 3 * 4, dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)]
    for value, passed in [(-100.0, 0.0), (100.0, 1.0)]:
        y[0][:, :8] = value
        x = EdgeOperations().gated(y, 2, 4)
        assert_close(x[0][:, :4], torch.nn.functional.silu(y[0][:, 8:12]))
        assert_close(x[0][:, 4:], passed * y[0][:, 12:], rtol=0, atol=1e-12)
        assert_close(x[1], passed * y[1], rtol=0, atol=1e-12)
