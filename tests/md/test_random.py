import numpy as np
import pytest
import torch
from scipy import stats

from gnnmd.md.random import BAROSTAT, LANGEVIN, THERMOSTAT, Numbers, normals, philox, uniforms


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # kat_vectors of Random123, philox4x32 with 10 rounds
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    seed = key[1] << 32 | key[0]
    assert list(philox(tuple(counter), seed)) == words
    tensors = philox(tuple(torch.tensor([c, c]) for c in counter), seed)
    assert [t.tolist() for t in tensors] == [[w, w] for w in words]


def test_noise_of_atoms_is_normal_and_belongs_to_the_atom():
    ids = torch.arange(50_000)
    x = normals(3, 17, LANGEVIN, ids)
    for column in x.T:
        assert stats.kstest(column, "norm").pvalue > 0.01
    np.testing.assert_allclose(np.corrcoef(x.T), np.eye(4), atol=0.015)
    assert torch.equal(normals(3, 17, LANGEVIN, ids[[7, 5]]), x[[7, 5]])
    for other in ((4, 17, LANGEVIN), (3, 18, LANGEVIN), (3, 17, THERMOSTAT)):
        assert abs(np.corrcoef(x[:, 0], normals(*other, ids)[:, 0])[0, 1]) < 0.015


@pytest.mark.parametrize("shape", [1.0, 2.5, 46.0, 1e6])
def test_gamma_variates_have_their_distribution(shape):
    x = [Numbers(1, step, THERMOSTAT).gamma(shape) for step in range(4000)]
    assert stats.kstest(x, stats.gamma(shape).cdf).pvalue > 0.01


def test_numbers_on_the_host_repeat_and_are_normal():
    numbers = Numbers(1, 2**40 + 3, BAROSTAT)
    x = [numbers.normals() for _ in range(4000)]
    again = Numbers(1, 2**40 + 3, BAROSTAT)
    assert [again.normals() for _ in range(4)] == x[:4]
    assert stats.kstest(np.ravel(x), "norm").pvalue > 0.01
    assert Numbers(1, 3, BAROSTAT).normals() != x[0]
    assert Numbers(1, 5, BAROSTAT).uniforms() == tuple(
        float(u) for u in uniforms(1, 5, BAROSTAT, torch.tensor([1]))
    )


def test_gamma_variates_of_small_shape_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Numbers(0, 0, THERMOSTAT).gamma(0.5)
