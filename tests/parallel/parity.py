"""One rank against many: everything a potential says, and the gradient of a loss that contains all of it."""

from dataclasses import fields

import torch
import torch.distributed as dist

from gnnmd.graph import AtomBatch
from gnnmd.models.potential import Potential
from gnnmd.parallel import AllGatherContext, GPContext, Ranks
from gnnmd.parallel.exchange import exchange_rows, sum_shared

Answers = dict[str, torch.Tensor]


class NoGhosts(GPContext):
    """Forgets to communicate: ghosts keep old rows."""

    def exchange(self, owned):
        if not owned.is_floating_point():
            return super().exchange(owned)
        return torch.cat((owned, super().exchange(owned)[self.n_owned :].detach() + 0.01))


class DroppedBackward(GPContext):
    """Fetches the ghosts but sends no gradient home."""

    def exchange(self, owned):
        return torch.cat((owned, exchange_rows(owned.detach(), self)[self.n_owned :]))


class DoubledSum(GPContext):
    """All-reduces the gradient of a result that is already the same on every rank."""

    def sum_ranks(self, partial):
        return sum_shared(partial, self)


class SharedAsResult(GPContext):
    """Takes a sum that feeds back into every rank's atoms for a result that leaves the model."""

    def sum_shared(self, partial):
        return super().sum_ranks(partial)


CONTEXTS = {"all_to_all": GPContext, "all_gather": AllGatherContext} | {
    c.__name__: c for c in (NoGhosts, DroppedBackward, DoubledSum, SharedAsResult)
}


def loss_of(prediction, system: torch.Tensor, sum_ranks) -> torch.Tensor:
    """Energy + force + stress loss against made-up labels; per-atom parts are summed over ranks."""
    n_atoms = sum_ranks(torch.bincount(system, minlength=len(prediction.energy)).to(torch.float64))
    loss = ((prediction.energy / n_atoms + 1.0) ** 2).sum()
    loss = loss + sum_ranks((prediction.forces - 0.3).pow(2).sum())
    known = prediction.stress[~prediction.stress.detach().isnan()]
    return loss + 100 * ((known - 0.01) ** 2).sum()


def one_rank(potential: Potential, batch: AtomBatch) -> Answers:
    """Return what one rank says without any plan."""
    n = len(batch.numbers)
    potential.train()
    potential.zero_grad()
    p = potential(batch.positions, potential.graph(batch), GPContext.single(n))
    loss_of(p, batch.system, lambda x: x).backward()
    return _answers(p, potential, lambda x: x)


def many_ranks(
    group, make, batch: AtomBatch, partition="auto", context="all_to_all", skin=0.0, headroom=0.0
) -> Answers:
    """Return what the ranks of a group say together, on every rank; job for the worker pool."""
    ranks = Ranks(group)
    potential = make().to(ranks.device)
    potential.train()
    batch = batch.to(ranks.device)
    plan = potential.plan(batch, ranks, partition=partition, skin=skin, headroom=headroom)
    kind = CONTEXTS[context]
    gp = kind.like(plan.gp) if kind is AllGatherContext else _as(kind, plan.gp)
    p = potential(plan.positions, plan.graph, gp)
    loss_of(p, plan.graph.system[: gp.n_owned], gp.sum_ranks).backward()
    for parameter in potential.parameters():
        if parameter.grad is not None:  # weights without influence have none, on no rank
            dist.all_reduce(parameter.grad, group=group)
    answers = _answers(p, potential, plan.gather_owned)
    answers["n_owned"] = torch.tensor(gp.n_owned)
    answers["n_ghost"] = torch.tensor(gp.n_ghost)
    return answers


def _as(kind, gp: GPContext) -> GPContext:
    return kind(**{f.name: getattr(gp, f.name) for f in fields(gp)})


def _answers(p, potential: Potential, whole) -> Answers:
    out = {
        "energy": p.energy,
        "forces": whole(p.forces),
        "stress": p.stress.nan_to_num(),
        "node energies": whole(p.node_energies),
    }
    gradients = {name: w.grad for name, w in potential.named_parameters()}
    out |= {f"gradient of {name}": x for name, x in gradients.items() if x is not None}
    return {name: x.detach().cpu() for name, x in out.items()}


def deviations(found: Answers, expected: Answers) -> dict[str, float]:
    """Return the largest deviation of each answer relative to its largest entry (at least 1)."""
    return {
        name: float((found[name] - x).abs().nan_to_num(torch.inf).max()) / max(1.0, float(x.abs().max()))
        for name, x in expected.items()
    }


def assert_ranks_agree(pool, size: int, make, batch: AtomBatch, *options) -> None:
    """Compare ``size`` ranks with one to 1e-10; ``options`` are those of `many_ranks`."""
    expected = one_rank(make(), batch)
    assert all(float(x.abs().max()) > 1e-9 for key, x in expected.items() if key != "stress")
    for found in pool.run(size, many_ranks, make, batch, "auto", *options, timeout=120):
        assert max(deviations(found, expected).values()) < 1e-10, deviations(found, expected)
