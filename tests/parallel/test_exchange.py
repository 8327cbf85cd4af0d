import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from gnnmd.parallel import AllGatherContext, GPContext, TimedContext
from tests.parallel.pool import RankError


def owned_counts(size: int) -> list[int]:
    """Uneven, and one rank owns nothing."""
    counts = [5 + 3 * r for r in range(size)]
    counts[size // 2] = 0 if size > 1 else 5
    return counts


def sent_rows(size: int) -> list[list[list[int]]]:
    """``rows[p][q]``: owned rows of p that rank q copies; none for some pairs, some rows to several."""
    rng = torch.Generator().manual_seed(size)
    counts = owned_counts(size)
    table = []
    for p in range(size):
        row = []
        for q in range(size):
            n = (
                0
                if p == q or (p + 2 * q) % 4 == 1
                else int(torch.randint(0, counts[p] + 1, (), generator=rng))
            )
            row.append(torch.randperm(counts[p], generator=rng)[:n].tolist())
        table.append(row)
    return table


def context(group, kind: str = "all_to_all") -> GPContext:
    rank, size = group.rank(), group.size()
    rows = sent_rows(size)
    recv = tuple(len(rows[p][rank]) for p in range(size))
    gp = GPContext(
        n_owned=owned_counts(size)[rank],
        n_ghost=sum(recv),
        send_idx=torch.tensor(sum(rows[rank], []), dtype=torch.int64),
        send_splits=tuple(len(rows[rank][q]) for q in range(size)),
        recv_splits=recv,
        group=group,
    )
    return AllGatherContext.like(gp) if kind == "all_gather" else gp


def rows_of_all(size: int, *shape: int) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(n, *shape, generator=rng, dtype=torch.float64) for n in owned_counts(size)]


def expected_exchange(x: list[torch.Tensor], rank: int) -> torch.Tensor:
    rows = sent_rows(len(x))
    return torch.cat([x[rank], *(x[p][rows[p][rank]] for p in range(len(x)))])


def nonlinear(x_all: torch.Tensor, shared: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Some energy of one rank's rows that every derivative of is different from zero."""
    i = torch.arange(len(x_all), dtype=x_all.dtype)[:, None]
    return (torch.sin(x_all * (1 + 0.1 * i)) @ weight).pow(2).sum() * torch.cos(shared.sum())


def derivatives(energy, x: list[torch.Tensor], weight: torch.Tensor) -> list[torch.Tensor]:
    """Forces, and the parameter and input gradients of a force loss, and one order more."""
    forces = torch.autograd.grad(energy, x, create_graph=True)
    loss = sum(f.pow(2).sum() for f in forces)
    second = torch.autograd.grad(loss, [*x, weight], create_graph=True)
    third = torch.autograd.grad(sum(s.pow(2).sum() for s in second[:-1]), [*x, weight])
    return [*(f.detach() for f in forces), *(s.detach() for s in second), *third]


def differentiate_here(group, kind: str, form: str) -> list[torch.Tensor]:
    size, rank = group.size(), group.rank()
    gp = context(group, kind)
    x = rows_of_all(size, 4)[rank].requires_grad_()
    weight = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()
    shared = gp.sum_shared(x.sum(0))
    if form == "start and finish":
        pending = gp.start_exchange(x)
        between = (x * 2) / 2
        x_all = pending.finish() + torch.nn.functional.pad(x - between, (0, 0, 0, gp.n_ghost))
    else:
        x_all = gp.exchange(x)
    local = nonlinear(x_all, shared, weight)
    energy = gp.sum_ranks(local)
    return [energy.detach(), *derivatives(local, [x], weight)]


@pytest.mark.parametrize(
    ("size", "kind", "form"),
    [
        (1, "all_to_all", "exchange"),
        (2, "all_to_all", "exchange"),
        (3, "all_to_all", "exchange"),
        (4, "all_to_all", "start and finish"),
        (3, "all_gather", "exchange"),
        (4, "all_gather", "start and finish"),
        (8, "all_to_all", "exchange"),
    ],
)
def test_energy_and_three_derivatives_equal_those_of_one_process(pool, size, kind, form):
    results = pool.run(size, differentiate_here, kind, form)

    x = [rows.requires_grad_() for rows in rows_of_all(size, 4)]
    weight = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()
    shared = sum(rows.sum(0) for rows in x)
    energy = sum(nonlinear(expected_exchange(x, rank), shared, weight) for rank in range(size))
    expected = derivatives(energy, x, weight)

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11 * float(b.abs().max()) if b.numel() else 0)

    for rank, (total, forces, second, _, third, _) in enumerate(results):
        close(total, energy.detach())
        close(forces, expected[rank])
        close(second, expected[size + rank])
        close(third, expected[2 * size + 1 + rank])
    # Parameter gradients: every rank has a part, the sum over ranks is the whole.
    close(sum(r[3] for r in results), expected[2 * size])
    close(sum(r[5] for r in results), expected[-1])


def fetch_types(group, kind: str) -> list[torch.Tensor]:
    gp = context(group, kind)
    x = 8 * rows_of_all(group.size(), 3, 2)[group.rank()]
    types = (torch.float64, torch.float32, torch.bfloat16, torch.int64)
    scalars = x[:, 0, 0]
    views = x.transpose(1, 2)  # not contiguous
    return [*(gp.exchange(x.to(dtype)) for dtype in types), gp.exchange(scalars), gp.exchange(views)]


@pytest.mark.parametrize("kind", ["all_to_all", "all_gather"])
def test_rows_of_every_type_and_shape_arrive_unchanged(pool, kind):
    for rank, (f64, f32, bf16, i64, scalars, views) in enumerate(pool.run(3, fetch_types, kind)):
        expected = expected_exchange([8 * x for x in rows_of_all(3, 3, 2)], rank)
        assert torch.equal(f64, expected)
        assert torch.equal(f32, expected.float())
        assert torch.equal(bf16, expected.bfloat16())
        assert torch.equal(i64, expected.long())
        assert torch.equal(scalars, expected[:, 0, 0])
        assert torch.equal(views, expected.transpose(1, 2))


def parameter_gradient_of_mean_energy(group) -> torch.Tensor:
    gp = context(group)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    total = gp.sum_ranks(weight * gp.n_owned)
    (total / 7).square().backward()
    return weight.grad


def test_gradient_through_sum_ranks_is_not_multiplied_by_the_number_of_ranks(pool):
    n = sum(owned_counts(4))
    assert float(sum(pool.run(4, parameter_gradient_of_mean_energy))) == pytest.approx(2 * n * n / 49)


def count_waits(group) -> list[int]:
    """Return how often a rank has waited after each of several steps."""
    waits, seen = [], []
    gp = context(group)
    gp = TimedContext.of(replace(gp, near=gp), lambda: nullcontext(waits.append(1)))
    x = rows_of_all(group.size(), 4)[group.rank()].requires_grad_()
    y = gp.exchange(x)
    seen.append(len(waits))
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    seen.append(len(waits))
    gradient.square().sum().backward()  # back through the gradient (fetch), and through the rows (give_back)
    seen.append(len(waits))
    pending = gp.between_layers.start_exchange(x)
    seen.append(len(waits))
    pending.finish().sum().backward()
    seen.append(len(waits))
    gp.sum_ranks(x.sum()).backward()
    seen.append(len(waits))
    gp.sum_shared(x.sum()).backward()
    return [*seen, len(waits)]


def test_every_wait_for_other_ranks_is_timed(pool):
    assert pool.run(2, count_waits) == [[1, 2, 4, 4, 6, 7, 9]] * 2


def test_one_rank_without_process_group_is_the_identity():
    gp = GPContext.single(3)
    x = torch.randn(3, 2)
    assert gp.exchange(x) is x
    assert gp.start_exchange(x).finish() is x
    assert gp.sum_ranks(x) is x
    assert gp.sum_shared(x) is x


def contradictory_tables(group) -> str:
    try:
        GPContext(2, 3, torch.tensor([0, 1]), (1, 1), (0, 2), group)
    except ValueError as error:
        return str(error)
    return ""


def test_split_tables_that_do_not_sum_to_the_ghosts_are_refused_before_any_communication(pool):
    assert all("recv_splits = (0, 2)" in message for message in pool.run(2, contradictory_tables))


def test_rows_of_the_wrong_number_are_refused():
    with pytest.raises(ValueError, match="takes the 3 rows"):
        GPContext.single(3).exchange(torch.zeros(4, 2))


def hang_or_raise(group) -> None:
    if group.rank() == 1:
        raise ZeroDivisionError("the cause")
    context(group).sum_ranks(torch.ones(1))  # waits for rank 1


def test_a_rank_that_raises_while_the_others_wait_ends_the_test_within_seconds(pool):
    start = time.monotonic()
    with pytest.raises(RankError, match="the cause"):
        pool.run(2, hang_or_raise)
    assert time.monotonic() - start < 20
