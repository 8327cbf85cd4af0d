from math import sqrt

import pytest
import torch
from torch.testing import assert_close

from gnnmd.nn.updates import Update

X, U, V = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)).unbind()


def test_means():
    assert_close(Update("res_avg", 2, 4)(X, [U, V]), (X + U + V) / sqrt(3))
    assert_close(Update("res_incr", 2, 4)(X, [U, V]), X + (U + V) / sqrt(2))
    assert not list(Update("res_avg", 2, 4).parameters())


def test_residual_vectors_go_by_position():
    update = Update("res_residual", 2, 4, 0.2)
    assert_close(update(X, [U, V]), X + 0.2 * U + 0.2 * V)
    with torch.no_grad():
        update.rho[1, 2] = 3.0
    expected = X + 0.2 * (U + V)
    expected[:, 2] += 2.8 * V[:, 2]
    assert_close(update(X, [U, V]), expected)
    assert_close(update.add(update.add(X, 0, U), 1, V), expected)


def test_random_residuals():
    torch.manual_seed(0)
    rho = Update("res_residual", 3, 1000, 0.01, "norm").rho
    assert rho.std().item() == pytest.approx(0.01, rel=0.1)
    assert abs(rho.mean()) < 0.001
