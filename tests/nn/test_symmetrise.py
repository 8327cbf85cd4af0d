import torch
from scipy.spatial.transform import Rotation
from torch.testing import assert_close

from gnnmd.nn.scatter import Groups, weighted_sums
from gnnmd.nn.symmetrise import symmetrised

GENERATOR = torch.Generator().manual_seed(0)
TARGET = torch.tensor([0, 0, 0, 2, 2])
GROUPS = Groups(TARGET, 3)
H = torch.randn(5, 3, dtype=torch.float64, generator=GENERATOR)
X = torch.randn(5, 4, dtype=torch.float64, generator=GENERATOR)


def test_by_its_definition():
    g = weighted_sums(H, X, GROUPS)
    for i in range(3):
        mine = i == TARGET
        assert_close(g[i], torch.einsum("ea,ec->ac", H[mine], X[mine]))
        assert_close(symmetrised(g, 2)[i], (g[i][:, :2].T @ g[i] / 3).flatten())


def test_rotations_change_nothing():
    r = torch.tensor(Rotation.random(random_state=0).as_matrix())
    found = symmetrised(weighted_sums(H @ r.T, X, GROUPS), 2)
    assert_close(found, symmetrised(weighted_sums(H, X, GROUPS), 2))
