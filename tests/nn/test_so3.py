import numpy as np
import pytest
import torch
from torch.testing import assert_close

from gnnmd.nn.activations import node_grid
from gnnmd.nn.so3 import (
    SO3Linear,
    SphereGrid,
    coupling,
    degrees,
    m_major_rows,
    n_rows,
    spherical_harmonics,
    split_degrees,
)


def angles(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.arccos(x[:, 1]), np.arctan2(x[:, 0], x[:, 2])


def directions(n: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, 3))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_low_degrees_are_the_known_polynomials():
    p = directions(20)
    x, y, z = p.T
    found = spherical_harmonics(2, *angles(p))
    vector = np.sqrt(3 / (4 * np.pi)) * p
    s3 = np.sqrt(3)
    tensor = [s3 * x * z, s3 * x * y, y * y - (x * x + z * z) / 2, s3 * y * z, s3 / 2 * (z * z - x * x)]
    assert_close(found[:, 1:4], vector, rtol=0, atol=1e-14)
    assert_close(found[:, 4:], np.sqrt(5 / (4 * np.pi)) * np.stack(tensor, axis=1), rtol=0, atol=1e-14)


def test_harmonics_are_orthonormal_on_the_sphere():
    grid = SphereGrid(6, list(range(49)), 14, 15)
    assert_close(grid.from_grid @ grid.to_grid, torch.eye(49, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("resolution", [None, 12, 20])
def test_there_and_back_on_the_grid_is_the_identity(resolution):
    grid, x = node_grid(3, resolution), torch.randn(5, 16, 4, dtype=torch.float64)
    assert_close(grid.to_coefficients(grid.to_values(x)), x, rtol=0, atol=1e-13)


def test_coupling_is_an_isometry_onto_the_higher_degree():
    for l in range(1, 6):
        c = coupling(l).reshape(-1, 2 * l + 3)
        assert_close(c.T @ c, np.eye(2 * l + 3), rtol=0, atol=1e-13)


def test_m_major_order():
    assert m_major_rows(2, 2) == [0, 2, 6, 3, 7, 1, 5, 8, 4]
    assert [degrees(3)[row] for row in m_major_rows(3, 1)] == [0, 1, 2, 3, 1, 2, 3, 1, 2, 3]
    assert sorted(m_major_rows(4, 4)) == list(range(n_rows(4)))


def test_linear_maps_keep_degrees_apart():
    torch.manual_seed(0)
    linear, x = SO3Linear(2, 3, 4), torch.zeros(2, 9, 3)
    x[:, 4:] = 1.0
    y = torch.cat(linear(split_degrees(x)), dim=1)
    assert_close(y[:, :1], linear.bias.expand(2, 1, 4))
    assert y[:, 1:4].abs().max() == 0
    assert_close(y[:, 4:], x[:, 4:] @ linear.weight[2].T)
