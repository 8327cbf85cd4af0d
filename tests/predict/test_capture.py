"""Evaluations replayed as one CUDA graph."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ase.build import bulk
from torch import Tensor
from torch.testing import assert_close

from gnnmd.graph import AtomBatch
from gnnmd.graph.neighbors import neighbor_list
from gnnmd.md.evaluation import WithinCutoff
from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.dpa3_config import DPA3Config
from gnnmd.models.escn_md import EscnMDConfig
from gnnmd.models.potential import Potential
from gnnmd.parallel import GPContext, Ranks, build_plan
from gnnmd.predict import InferenceSettings
from gnnmd.predict.capture import CapturedPotential, _Capture
from gnnmd.predict.evaluation import frozen_copy, own_arithmetic
from tests.models.conformance import assert_same

SKIN = 0.4
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


MODELS = {
    "dpa3": DPA3Config(type_map=("Ag",), n_dim=16, e_dim=8, a_dim=4, nlayers=3),
    "escn_md": EscnMDConfig(channels=16, hidden_channels=8, edge_channels=8, num_layers=2),
    "escn_md in pieces": EscnMDConfig(channels=16, hidden_channels=8, edge_channels=8, num_layers=2),
}


def silver(device: str, model: str = "dpa3") -> tuple[Potential, AtomBatch]:
    torch.manual_seed(0)
    atoms = bulk("Ag", cubic=True).repeat(2)
    atoms.rattle(0.1, seed=0)
    settings = InferenceSettings(dtype="float64")
    potential = frozen_copy(build_potential(PotentialConfig(MODELS[model])), torch.device(device), settings)
    if "pieces" in model:
        potential.backbone.edge_chunk = 300
    return potential, AtomBatch.from_ase(atoms).to(device)


def steps(batch: AtomBatch, n: int) -> list[tuple[Tensor, Tensor]]:
    """Return positions and cells that use up the skin."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(n):
        u = torch.randn(len(batch.numbers), 3, dtype=torch.float64, generator=generator)
        u *= SKIN / 3 / u.norm(dim=1, keepdim=True)
        found.append((batch.positions + u.to(batch.positions), batch.cell * (1 + 0.001 * i)))
    return found


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("model", MODELS)
def test_one_capture_serves_a_neighbour_list(model):
    potential, batch = silver("cuda", model)
    gp, captured = GPContext.single(len(batch.numbers)), CapturedPotential(potential, skin=SKIN)
    wide = neighbor_list(batch, potential.r_cut + SKIN)
    graph = potential.graph(batch, replace(wide, r_cut=potential.r_cut))
    with own_arithmetic(batch.positions.device, tf32=False):
        kept = captured(batch.positions, graph, gp)
        first = kept.forces.clone()
        for x, cell in steps(batch, 3):
            now = replace(batch, positions=x, cell=cell)
            expected = potential(x, potential.graph(now), gp)
            assert_same(captured(x, replace(graph, cell=cell), gp), expected)
        assert captured.n_captures == 1
        assert kept.forces.equal(first)  # results are copies
        captured(batch.positions, graph, gp, stress=False)
        captured(batch.positions, potential.graph(batch), gp, stress=False)
    assert captured.n_captures == 3


class SpoiltGraph:
    """A `torch.cuda.CUDAGraph` whose capture fails."""

    def capture_begin(self, pool):
        pass

    def capture_end(self):
        raise RuntimeError("operation failed due to a previous error during capture")


def test_a_capture_that_fails_says_why(monkeypatch):
    potential, batch = silver("cpu")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SpoiltGraph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(potential.backbone, "embed", lambda *_: torch.ones(2) @ torch.ones(3))
    gp, graph = GPContext.single(len(batch.numbers)), potential.graph(batch)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        _Capture(potential, batch.positions, graph, gp, True, None).capture(
            SimpleNamespace(pool=None, stream=None)
        )


def test_without_a_gpu_it_is_a_call():
    potential, batch = silver("cpu")
    gp, captured = GPContext.single(len(batch.numbers)), CapturedPotential(potential, skin=SKIN)
    graph = potential.graph(batch)
    assert_same(captured(batch.positions, graph, gp), potential(batch.positions, graph, gp))
    assert captured.n_captures == 0


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=[pytest.mark.gpu, CUDA]), "cpu"])
def test_a_cell_that_has_changed_since_the_list_was_made_hides_no_angle(device):
    """Positions of then with the cell of now would take pairs through a face for too far apart."""
    potential, batch = silver(device)
    gp, captured = GPContext.single(len(batch.numbers)), CapturedPotential(potential, skin=SKIN)
    wide = replace(neighbor_list(batch, potential.r_cut + SKIN), r_cut=potential.r_cut)
    now = replace(batch, positions=1.3 * batch.positions, cell=1.3 * batch.cell)
    graph = replace(potential.graph(batch, wide), cell=now.cell)
    with own_arithmetic(batch.positions.device, tf32=False):
        expected = potential(now.positions, potential.graph(now), gp)
        found = captured(now.positions, graph, gp, listed_at=(batch.positions, batch.cell))
        assert_same(found, expected)
        captured.renew()
        mixed = captured(now.positions, graph, gp, listed_at=(batch.positions, now.cell))
    assert (mixed.forces - expected.forces).abs().max() > 1e-7


@pytest.mark.parametrize("model", MODELS)
def test_what_is_derived_from_the_edges_once_serves_other_positions(model):
    potential, batch = silver("cpu", model)
    gp = GPContext.single(len(batch.numbers))
    graph = replace(neighbor_list(batch, potential.r_cut + SKIN), r_cut=potential.r_cut)
    linked = potential.linked(batch.positions, potential.graph(batch, graph), gp, skin=SKIN)
    assert linked.links is not None
    for x, cell in steps(batch, 3):
        expected = potential(x, potential.graph(replace(batch, positions=x, cell=cell)), gp)
        assert_same(potential(x, replace(linked, cell=cell), gp), expected)


@pytest.mark.parametrize("model", ["escn_md", "escn_md in pieces"])
def test_spare_edges_are_in_no_sum(model):
    potential, batch = silver("cpu", model)
    g = replace(potential.graph(batch), n_edges=torch.tensor(1200))
    assert g.edge_index.shape[1] > 1200
    pieces = potential.linked(batch.positions, g, GPContext.single(len(batch.numbers))).links
    assert (len(pieces) > 1) == ("pieces" in model)
    assert sum(int(p.target.first[-1]) for p in pieces) == 1200
    assert sum(int(p.source.first[-1]) for p in pieces) == 1200


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=[pytest.mark.gpu, CUDA]), "cpu"])
@pytest.mark.parametrize("model", ["dpa3", "escn_md"])
def test_edges_and_angles_of_now_are_chosen_in_the_capture(model, device):
    potential, batch = silver(device, model)
    backbone, ids = potential.backbone, torch.arange(len(batch.numbers), device=device)
    plan = build_plan(batch, ids, potential.r_cut, Ranks(), skin=SKIN)
    lengths = backbone.lengths(
        backbone.links(plan.graph.with_positions(plan.positions, batch.cell), len(ids))
    )
    room = [plan.graph.edge_index.shape[1] - 10, *(2 * n for n in lengths)]
    shorten = WithinCutoff.of(plan, backbone, room)
    captured = CapturedPotential(potential, skin=SKIN)
    with own_arithmetic(batch.positions.device, tf32=False):
        for x, cell in steps(batch, 3):
            graph = replace(plan.graph, cell=cell)
            found = captured(x[plan.ids], graph, plan.gp, shorten=shorten)
            expected = potential(x, potential.graph(replace(batch, positions=x, cell=cell)), plan.gp)
            assert (captured.needed <= shorten.limits).all()
            assert_close(found.energy, expected.energy, rtol=0, atol=1e-11)
            assert_close(found.forces, expected.forces[plan.ids], rtol=0, atol=1e-11)
            assert_close(found.stress, expected.stress, rtol=0, atol=1e-12)
    assert captured.n_captures == (1 if device == "cuda" else 0)


@pytest.mark.parametrize("short", [0, 1, 2])
def test_lists_that_are_too_short_are_noticed(short):
    """Of edges, of edges that form angles, and of angles."""
    potential, batch = silver("cpu", "dpa3")
    backbone, ids = potential.backbone, torch.arange(len(batch.numbers))
    plan = build_plan(batch, ids, potential.r_cut, Ranks(), skin=SKIN)
    exact = plan.within_cutoff(plan.positions, batch.cell)
    room = [exact.edge_index.shape[1], *backbone.lengths(backbone.links(exact, len(ids)))]
    assert len(room) == 3
    graph, needed = WithinCutoff.of(plan, backbone, [room[0], room[1], room[2] + 9])(
        plan.positions, batch.cell
    )
    assert needed.tolist() == room
    assert_same(potential(plan.positions, graph, plan.gp), potential(plan.positions, exact, plan.gp))
    room[short] -= 1
    graph, needed = WithinCutoff.of(plan, backbone, room)(plan.positions, batch.cell)
    assert needed[short] == room[short] + 1
    assert potential(plan.positions, graph, plan.gp).forces.isfinite().all()


@pytest.mark.parametrize("spare", [None, 9])
def test_lists_come_with_the_order_of_their_sums(spare):
    potential, batch = silver("cpu", "dpa3")
    backbone, n = potential.backbone, len(batch.numbers)
    g = potential.graph(batch).with_positions(batch.positions, batch.cell)
    (found,) = exact = backbone.links(g, n)
    if spare is not None:
        (found,) = backbone.links(g, n, room=[length + spare for length in backbone.lengths(exact)])
    for groups in (found.source, found.target, found.ij, found.ik):
        order = torch.arange(len(groups.index)) if groups.order is None else groups.order
        assert order.equal(torch.argsort(groups.index, stable=True))
