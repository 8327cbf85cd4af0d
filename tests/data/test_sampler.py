import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnnmd.data.sampler import AtomsBatchSampler

SIZES = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 900)), min_size=1, max_size=40)
BOUND = st.none() | st.integers(1, 10)


def make(sizes: list[tuple[int, int]], **options: Any) -> AtomsBatchSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # frames above a bound have a test of their own
        return AtomsBatchSampler([a for a, _ in sizes], [e for _, e in sizes], **options)


@given(
    sizes=SIZES,
    frames=BOUND,
    atoms=st.none() | st.integers(1, 200),
    edges=st.integers(1, 3000),
    epoch=st.integers(0, 50),
    shuffle=st.booleans(),
)
@settings(deadline=None)
def test_every_frame_comes_once_and_no_bound_is_exceeded(
    sizes: list[tuple[int, int]], frames: int | None, atoms: int | None, edges: int, epoch: int, shuffle: bool
) -> None:
    sampler = make(sizes, max_frames=frames, max_atoms=atoms, max_edges=edges, shuffle=shuffle)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
    assert len(batches) == len(sampler)
    for batch in batches:
        if len(batch) > 1:
            assert len(batch) <= (frames or len(sizes))
            assert sum(sizes[i][0] for i in batch) <= (atoms or np.inf)
            assert sum(sizes[i][1] for i in batch) <= edges
    if not shuffle:
        assert [i for batch in batches for i in batch] == list(range(len(sizes)))


@given(sizes=SIZES, bound=st.integers(60, 200), seed=st.integers(0, 9))
@settings(deadline=None)
def test_the_number_of_batches_does_not_change_from_epoch_to_epoch(
    sizes: list[tuple[int, int]], bound: int, seed: int
) -> None:
    """Lightning fixes it at the first epoch, and learning-rate schedules count on it."""
    sampler = make(sizes, max_atoms=bound, seed=seed)
    for epoch in range(12):
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler)


def test_orders_that_pack_badly_are_drawn_again_without_losing_a_frame() -> None:
    rng = np.random.default_rng(0)
    sizes = [(int(n), 0) for n in rng.integers(1, 60, 300)]
    sampler = make(sizes, max_atoms=100)
    packed = []
    for epoch in range(60):
        sampler.set_epoch(epoch)
        assert sorted(i for batch in sampler for i in batch) == list(range(300))
        packed.append(len(sampler._pack(np.random.default_rng([0, epoch]).permutation(300))))
    assert max(packed) > len(sampler) > min(packed)  # both remedies were needed


@given(sizes=SIZES, replicas=st.integers(1, 6), bound=st.integers(60, 200), epoch=st.integers(0, 5))
@settings(deadline=None)
def test_replicas_get_equally_many_batches_of_disjoint_frames(
    sizes: list[tuple[int, int]], replicas: int, bound: int, epoch: int
) -> None:
    shares = []
    for rank in range(replicas):
        sampler = make(sizes, max_atoms=bound, num_replicas=replicas, rank=rank)
        sampler.set_epoch(epoch)
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler)
    assert len({len(share) for share in shares}) == 1
    seen = [i for share in shares for batch in share for i in batch]
    assert set(seen) == set(range(len(sizes)))
    if len(sizes) >= replicas * len(shares[0]):
        assert len(seen) == len(sizes)
    else:  # too few frames to go round
        assert len(seen) < len(sizes) + replicas


@given(sizes=SIZES, replicas=st.integers(1, 4), accumulate=st.integers(1, 4), epoch=st.integers(0, 3))
@settings(deadline=None)
def test_epochs_are_whole_steps_and_repeated_frames_are_known(
    sizes: list[tuple[int, int]], replicas: int, accumulate: int, epoch: int
) -> None:
    first, repeated = [], []
    for rank in range(replicas):
        sampler = make(sizes, max_atoms=100, num_replicas=replicas, rank=rank, accumulate=accumulate)
        sampler.set_epoch(epoch)
        assert len(sampler) % accumulate == 0
        for position, batch in enumerate(sampler):
            (repeated if sampler.repeats(position) else first).extend(batch)
    assert sorted(first) == list(range(len(sizes)))
    assert set(repeated) <= set(first)


def test_too_few_frames_for_the_replicas_are_repeated() -> None:
    shares = [list(make([(5, 0)] * 3, max_frames=1, num_replicas=4, rank=r)) for r in range(4)]
    assert sorted(len(share) for share in shares) == [1, 1, 1, 1]
    assert {share[0][0] for share in shares} == {0, 1, 2}


def test_orders_differ_between_epochs_and_seeds_and_repeat_after_a_restart() -> None:
    sizes = [(n, 50 * n) for n in range(1, 60)]
    one, two, other = (
        make(sizes, max_atoms=100),
        make(sizes, max_atoms=100),
        make(sizes, max_atoms=100, seed=1),
    )
    first = list(one)
    assert list(two) == first
    assert list(other) != first
    one.set_epoch(1)
    assert list(one) != first
    one.set_epoch(0)
    assert list(one) == first


def test_a_restart_continues_with_the_next_batch() -> None:
    sizes = [(n, 50 * n) for n in range(1, 60)]
    sampler, restarted = make(sizes, max_atoms=100), make(sizes, max_atoms=100)
    sampler.set_epoch(7)
    whole = list(sampler)
    restarted.load_state_dict({"epoch": 7, "position": 5})
    restarted.set_epoch(7)  # announced once more by the trainer
    assert restarted.state_dict() == {"epoch": 7, "position": 5}
    assert len(restarted) == len(whole)
    assert list(restarted) == whole[5:]
    assert list(restarted) == whole  # once only
    restarted.load_state_dict({"epoch": 7, "position": 5})
    restarted.set_epoch(8)
    assert len(list(restarted)) == len(whole)


def test_a_frame_above_the_bound_goes_alone_with_one_warning() -> None:
    with pytest.warns(
        UserWarning, match=r"2 of 4 frames have more atoms than max_atoms=10 \(frame 3: 30\)"
    ) as caught:
        sampler = AtomsBatchSampler([5, 20, 5, 30], [0] * 4, max_atoms=10, shuffle=False)
    assert len(caught) == 1
    assert list(sampler) == [[0], [1], [2], [3]]
    assert list(AtomsBatchSampler([5, 5, 5], [1, 1, 1], max_atoms=10, shuffle=False)) == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "do not bound a batch. Set at least one"),
        ({"max_atoms": 0}, "max_atoms=0"),
        ({"max_frames": 1, "num_replicas": 2, "rank": 2}, "rank=2 is not one of num_replicas=2"),
    ],
)
def test_settings_without_sense_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make([(1, 1)], **options)
    with pytest.raises(ValueError, match="max_edges=5 needs the number of edges"):
        AtomsBatchSampler([1], None, max_edges=5)
    with pytest.raises(ValueError, match="there are no frames"):
        make([], max_frames=1)
