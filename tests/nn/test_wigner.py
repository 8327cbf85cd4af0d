import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch.testing import assert_close

from gnnmd.nn.so3 import m_major_rows, n_rows, spherical_harmonics
from gnnmd.nn.wigner import WignerD, edge_frames
from tests.nn.test_so3 import angles, directions

POLES = np.array([[0, 1, 0], [0, -1, 0], [1, 0, 0], [0, 0, -1.0], [1e-9, -1, 1e-9], [0.6, 1e-300, 0.8]])


def all_directions() -> torch.Tensor:
    x = np.concatenate([directions(30), POLES])
    return torch.tensor(x / np.linalg.norm(x, axis=1, keepdims=True))


def test_frames_are_rotations_that_take_edges_to_y():
    e = all_directions()
    r = edge_frames(e)
    assert_close(
        r @ e[:, :, None],
        torch.tensor([0.0, 1, 0], dtype=e.dtype).expand(len(e), 3)[..., None],
        rtol=0,
        atol=1e-14,
    )
    assert_close(r @ r.mT, torch.eye(3, dtype=e.dtype).expand(len(e), 3, 3), rtol=0, atol=1e-14)
    assert_close(torch.linalg.det(r), torch.ones(len(e), dtype=e.dtype))


@pytest.mark.parametrize("lmax", [0, 1, 2, 3, 6])
def test_rotated_harmonics(lmax):
    """Y(R p) = D Y(p), for every row with all orders kept."""
    r = torch.tensor(Rotation.random(10, random_state=0).as_matrix())
    wigner = WignerD(lmax, lmax)(r)
    p = directions(7, seed=1)
    y = torch.tensor(spherical_harmonics(lmax, *angles(p)))
    for matrix, d in zip(r.numpy(), wigner, strict=True):
        rotated = torch.tensor(spherical_harmonics(lmax, *angles(p @ matrix.T)))[:, m_major_rows(lmax, lmax)]
        assert_close(y @ d.T, rotated, rtol=0, atol=1e-13)


def test_rows_beyond_mmax_are_left_out():
    r = edge_frames(all_directions())
    full, part = WignerD(4, 4)(r), WignerD(4, 2)(r)
    kept = [m_major_rows(4, 4).index(row) for row in m_major_rows(4, 2)]
    assert part.shape == (len(r), len(kept), n_rows(4))
    assert_close(part, full[:, kept], rtol=0, atol=0)


def test_orthogonal_in_float32():
    """Rounding of the recursion stays at the level of float32 up to degree 6."""
    d = WignerD(6, 6)(edge_frames(all_directions().float()))
    assert_close(d @ d.mT, torch.eye(49).expand(len(d), 49, 49), rtol=0, atol=5e-6)


def test_gradient_is_finite_on_the_axes():
    e = all_directions().requires_grad_()
    wigner = WignerD(3, 3)(edge_frames(e / e.norm(dim=1, keepdim=True)))
    (gradient,) = torch.autograd.grad((wigner * torch.randn_like(wigner)).sum(), e)
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 1e3
