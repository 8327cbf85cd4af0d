import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch.utils._python_dispatch import TorchDispatchMode

from gnnmd.graph import AtomBatch
from gnnmd.graph.geometry import edge_vectors
from gnnmd.models.emt import emt
from gnnmd.parallel import AllGatherContext, GPContext, RankFailure, Ranks, build_plan, share_of
from gnnmd.parallel.guards import check_share
from tests.parallel.structures import structure

R_CUT = emt().r_cut


def plan_of(group, batch: AtomBatch, **options):
    ranks = Ranks(group)
    piece, ids = share_of(batch, ranks)
    return build_plan(piece, ids, R_CUT, ranks, **options)


def single_energy(batch: AtomBatch) -> tuple[torch.Tensor, torch.Tensor]:
    potential = emt().eval()
    p = potential(batch.positions, potential.graph(batch), GPContext.single(len(batch.numbers)))
    return p.energy, p.forces


# --- the edges of a plan
# -------------------------------------------------------------------------------------


def edges_by_id(group, batch: AtomBatch, partition: str = "auto") -> list[tuple[int, ...]]:
    plan = plan_of(group, batch, partition=partition)
    source, target = plan.ids[plan.graph.edge_index]
    return torch.cat((source[:, None], target[:, None], plan.graph.shift), 1).tolist()


@pytest.mark.parametrize("name", ["batch", "unwrapped", "left-handed"])
def test_all_ranks_together_have_the_edges_of_one_rank_and_none_twice(pool, name):
    batch = structure(name)
    g = emt().graph(batch)
    expected = torch.cat((g.edge_index.T, g.shift), 1).tolist()
    found = sum(pool.run(3, edges_by_id, batch), [])
    assert sorted(found) == sorted(expected)


def random_systems(seed: int) -> AtomBatch:
    """Three systems with random cells (also left-handed, thin, skewed), periodicity, density and wrapping."""
    rng = np.random.default_rng(seed)
    systems = []
    for _ in range(3):
        cell = rng.normal(0, 1, (3, 3)) * 3 + np.diag(rng.uniform(3, 25, 3))
        if abs(np.linalg.det(cell)) < 0.1 * np.linalg.norm(cell, axis=1).prod():
            cell = np.diag(rng.uniform(3, 20, 3))
        n = int(rng.integers(1, 40))
        positions = rng.uniform(-1, 2, (n, 3)) @ cell
        if rng.random() < 0.3:
            positions[:, 2] *= 0.1  # a layer in vacuum
        systems.append(Atoms(f"Ag{n}", positions, cell=cell, pbc=rng.random(3) < 0.6))
    return AtomBatch.from_ase(systems)


def edges_of_random_systems(group, seeds: range, partition: str) -> list[list[tuple[int, ...]]]:
    return [edges_by_id(group, random_systems(seed), partition) for seed in seeds]


@pytest.mark.parametrize("partition", ["auto", "index"])
def test_random_cells_and_periodicities_lose_no_edge(pool, partition):
    seeds = range(6)
    results = pool.run(5, edges_of_random_systems, seeds, partition)
    for seed in seeds:
        g = emt().graph(random_systems(seed))
        expected = torch.cat((g.edge_index.T, g.shift), 1).tolist()
        assert sorted(sum((r[seed] for r in results), [])) == sorted(expected), seed


# --- motion: when a plan may be kept, and what happens when it is rebuilt
# -----------------------------------------


def walk(group, batch: AtomBatch, skin: float, n_steps: int, partition: str) -> tuple[list[float], int, int]:
    """Random walk with the plan kept as long as it says so; return largest errors against one rank."""
    rng = torch.Generator().manual_seed(0)
    plan = plan_of(group, batch, skin=skin, partition=partition)
    potential = emt().eval()
    x, cell = batch.positions, batch.cell
    errors, rebuilt, moved_home = [], 0, 0
    for _ in range(n_steps):
        x = x + 0.12 * torch.randn(x.shape, generator=rng, dtype=x.dtype)
        cell = cell * (1 + 0.004 * torch.randn((), generator=rng, dtype=x.dtype))
        mine = x[plan.ids[: plan.gp.n_owned]]
        if plan.moved_too_far(mine, cell):
            before = plan.ids[: plan.gp.n_owned]
            plan = plan.rebuild(mine, cell)
            rebuilt += 1
            moved_home += not torch.equal(before, plan.ids[: plan.gp.n_owned])
            mine = x[plan.ids[: plan.gp.n_owned]]
        p = potential(mine, plan.within_cutoff(mine, cell), plan.gp)
        energy, forces = single_energy(replace(batch, positions=x, cell=cell))
        errors.append(
            float((p.energy - energy).abs().max() + (plan.gather_owned(p.forces) - forces).abs().max())
        )
    return errors, rebuilt, moved_home


def test_energy_and_forces_stay_exact_while_atoms_move_and_the_cell_changes(pool):
    """Stale halos, cells that change under a standing list, atoms lost at a rebuild would show here."""
    for errors, rebuilt, moved_home in pool.run(3, walk, structure("unwrapped"), 1.0, 24, "auto"):
        assert max(errors) < 1e-9
        assert 2 < rebuilt < 24
        assert moved_home < rebuilt  # ownership outlives most rebuilds


def shapes_of(plan) -> tuple:
    return plan.graph.edge_index.shape[1], plan.gp.n_ghost, plan.gp.send_splits, plan.gp.recv_splits


def walk_with_room(group, batch: AtomBatch, headroom: float, step: float) -> tuple[list[float], int, bool]:
    """Rebuild at every step; return errors against one rank, number of shapes, whether all had room."""
    rng = torch.Generator().manual_seed(0)
    potential = emt().eval()
    plan = plan_of(group, batch, headroom=headroom, skin=0.3)
    x, errors, shapes, roomy = batch.positions, [], set(), True
    for _ in range(6):
        x = x + step * torch.randn(x.shape, generator=rng, dtype=x.dtype)
        plan = plan.rebuild(x[plan.ids[: plan.gp.n_owned]], batch.cell)
        shapes.add(shapes_of(plan))
        roomy &= bool(plan.graph.n_edges <= plan.graph.edge_index.shape[1]) if headroom else True
        mine = x[plan.ids[: plan.gp.n_owned]]
        energy, forces = single_energy(replace(batch, positions=x))
        for graph in (plan.graph, plan.within_cutoff(mine, batch.cell)):  # with and without spare edges
            p = potential(mine, graph, plan.gp)
            errors.append(float((plan.gather_owned(p.forces) - forces).abs().max()))
            errors.append(float((p.energy - energy).abs().max()))
    return errors, len(shapes), roomy


def shortened(group, batch: AtomBatch) -> list[tuple[int, int]]:
    """Compare lists with room with exact ones; return edges and edges that were asked for."""
    plan, found = plan_of(group, batch, skin=1.0), []
    mine = batch.positions[plan.ids[: plan.gp.n_owned]]
    exact = plan.within_cutoff(mine, batch.cell)
    n, all_of_them = exact.edge_index.shape[1], plan.graph.edge_index.shape[1]
    for room in {n, (n + all_of_them) // 2, all_of_them + 7, n // 2}:
        g = plan.within_cutoff(mine, batch.cell, room)
        listed = min(room, all_of_them)
        assert g.n_edges == n
        assert g.edge_index.shape[1] == len(g.shift) == listed
        k = min(n, listed)
        assert g.edge_index[:, :k].equal(exact.edge_index[:, :k])
        assert g.shift[:k].equal(exact.shift[:k])
        last = torch.tensor([[len(g.numbers) - 1], [plan.gp.n_owned - 1]])
        assert g.edge_index[:, k:].equal(last.expand(2, listed - k))
        found.append((n, listed))
    return found


def test_lists_with_room_begin_with_the_edges_and_end_with_spare_ones(pool):
    for found in pool.run(3, shortened, structure("unwrapped")):
        assert any(n > listed for n, listed in found)
        assert any(n < listed for n, listed in found)


def ends_of_spares(group, batch: AtomBatch) -> tuple[int, bool]:
    """Return how many spare edges there are, and whether all lead from the last row to the last atom."""
    g, gp = (plan := plan_of(group, batch, headroom=0.2)).graph, plan.gp
    assert gp.n_ghost > 0
    spare = g.edge_index[:, int(g.n_edges) :]
    last = torch.tensor([[gp.n_owned + gp.n_ghost - 1], [gp.n_owned - 1]])
    return spare.shape[1], spare.equal(last.expand_as(spare))


def test_spare_edges_are_the_last_of_any_source_and_target(pool):
    """Sums over the edges of a source or target read so many as there are, in the order of either."""
    for n_spare, at_the_end in pool.run(3, ends_of_spares, structure("unwrapped")):
        assert n_spare > 0
        assert at_the_end


def test_shapes_survive_rebuilds_where_there_is_room(pool):
    batch = structure("unwrapped")
    for errors, n_shapes, roomy in pool.run(3, walk_with_room, batch, 0.2, 0.03):
        assert max(errors) < 1e-9
        assert n_shapes == 1
        assert roomy
    without = pool.run(3, walk_with_room, batch, 0.0, 0.03)
    assert max(n_shapes for _, n_shapes, _ in without) > 1


def test_what_does_not_fit_gets_more_room_and_no_edge_is_dropped(pool):
    """Neighbour capacity exceeded: the fault is to go on with what fits."""
    found = pool.run(3, walk_with_room, structure("unwrapped"), 1e-3, 0.3)
    assert max(max(errors) for errors, _, _ in found) < 1e-9
    assert max(n_shapes for _, n_shapes, _ in found) > 1
    assert all(roomy for _, _, roomy in found)


def plan_made_again(group, batch: AtomBatch, headroom: float, forget: str) -> list[str]:
    """Save a plan in the middle of a walk, make it again with its atoms elsewhere; say what is different."""
    rng = torch.Generator().manual_seed(group.rank())
    options = {"headroom": headroom, "skin": 0.3, "near": 3.4}
    plan = plan_of(group, batch, **options)
    x, cell = plan.positions, batch.cell
    for _ in range(3):  # so that the room is that of an earlier plan
        x, cell = x + 0.1 * torch.randn(x.shape, generator=rng, dtype=x.dtype), cell * 0.999
        plan = plan.rebuild(x, cell)
        x = plan.positions
    n = plan.gp.n_owned
    away = replace(
        batch,
        positions=x + 0.1,
        numbers=plan.graph.numbers[:n],
        system=plan.graph.system[:n],
        forces=torch.zeros_like(x),
        cell=cell * 1.001,
    )
    saved = plan.saved()
    if forget == "positions":
        saved["positions"] = away.positions * 1.01
    again = build_plan(
        away, plan.ids[:n], R_CUT, plan.ranks, carried=(away.positions,), saved=saved, **options
    )
    pairs = [(again.carried[0], away.positions)]
    for one, two in ((plan, again), (plan.rebuild(x + 0.3, cell), again.rebuild(x + 0.3, cell))):
        pairs += [(getattr(one, name), getattr(two, name)) for name in ("positions", "ids", "_load")]
        fields = ("edge_index", "shift", "numbers", "cell", "n_edges")
        pairs += [(getattr(one.graph, name), getattr(two.graph, name)) for name in fields]
        pairs += [(one.gp.send_idx, two.gp.send_idx), (one.cuts.threshold, two.cuts.threshold)]
        pairs += [(one.gp.between_layers.send_idx, two.gp.between_layers.send_idx)]
    return [f"{a} {b}" for a, b in pairs if not (a is b is None or torch.equal(a, b))]


@pytest.mark.parametrize("headroom", [0.0, 0.2])
def test_a_saved_plan_is_made_again_as_it_stood(pool, headroom):
    batch = structure("unwrapped")
    for differences in pool.run(3, plan_made_again, batch, headroom, ""):
        assert not differences
    assert any(pool.run(3, plan_made_again, batch, headroom, "positions"))


def exchange_near(group, batch: AtomBatch, headroom: float) -> list[float]:
    """Return what is wrong with the two exchanges of a plan whose layers read near neighbours only."""
    plan = plan_of(group, batch, near=3.4, headroom=headroom, skin=0.2)
    rng = torch.Generator().manual_seed(0)
    mine = plan.ids[: plan.gp.n_owned]
    plan = plan.rebuild(batch.positions[mine] + 0.01, batch.cell)
    mine = plan.ids[: plan.gp.n_owned]
    x = torch.randn(len(batch.numbers), 3, generator=rng, dtype=torch.float64)
    known = plan.ids >= 0  # not a spare row
    errors = []
    for gp in (plan.gp, plan.gp.between_layers, AllGatherContext.like(plan.gp).between_layers):
        rows = gp.exchange(x[mine].requires_grad_())
        n = len(rows)
        errors.append(float((rows - x[plan.ids[:n]])[known[:n]].abs().sum()))
        # The backward pass is the transpose: <exchange(x), y> = <x, transpose(y)>, summed over ranks.
        y = torch.randn(n, 3, generator=rng, dtype=torch.float64) * known[:n, None]
        owned = x[mine].requires_grad_()
        product = (gp.exchange(owned) * y).sum()
        transposed = (torch.autograd.grad(product, owned)[0] * owned).sum()
        errors.append(float(plan.ranks.sum((product - transposed).detach()).abs()))
    g = plan.graph.with_positions(plan.gp.exchange(batch.positions[mine] + 0.01), batch.cell)
    source = g.edge_index[0][edge_vectors(g).norm(dim=1) < 3.4]
    errors.append(float((source >= n).sum()))
    errors.append(float(plan.gp.n_ghost <= plan.gp.between_layers.n_ghost))
    return errors


@pytest.mark.parametrize("headroom", [0.0, 0.3])
def test_layers_that_read_near_neighbours_exchange_only_these(pool, headroom):
    for errors in pool.run(3, exchange_near, structure("unwrapped"), headroom):
        assert max(errors) < 1e-10, errors


def test_nearest_neighbours_cannot_be_kept_while_atoms_move():
    with pytest.raises(ValueError, match="skin=0"):
        plan_of(None, structure("unwrapped"), skin=0.5, max_neighbors=20)


def drift_apart(group) -> tuple[float, float]:
    """Mix the atoms of a rod completely: keeping the owners would make everyone everybody's ghost."""
    atoms = bulk("Ag", "fcc", a=4.09, cubic=True) * (1, 2, 16)
    batch = AtomBatch.from_ase(atoms)
    plan = plan_of(group, batch)
    order = torch.randperm(len(atoms), generator=torch.Generator().manual_seed(0))
    x = batch.positions[order]
    new = plan.rebuild(x[plan.ids[: plan.gp.n_owned]], batch.cell)
    return float(plan.gp.n_ghost), float(new.gp.n_ghost)


def test_a_partition_that_has_become_bad_is_made_anew(pool):
    for before, after in pool.run(4, drift_apart):
        assert after < 1.3 * before


def judge_motion(group, batch: AtomBatch, who: int, displacement, strain: float) -> bool:
    plan = plan_of(group, batch, skin=1.0)
    x = batch.positions.clone()
    x[who] += torch.as_tensor(displacement, dtype=x.dtype)
    mine = (x * (1 + strain))[plan.ids[: plan.gp.n_owned]]
    return bool(plan.moved_too_far(mine, batch.cell * (1 + strain)))


@pytest.mark.parametrize(
    ("displacement", "strain", "too_far"),
    [
        ([0.0, 0.0, 0.0], 0.0, False),
        ([0.49, 0.0, 0.0], 0.0, False),
        ([0.51, 0.0, 0.0], 0.0, True),
        ([8.18, 0.0, 0.0], 0.0, True),  # wrapped to the other side: the shifts of its edges are wrong now
        ([0.0, 0.0, 0.0], 0.05, False),  # swelling moves atoms by more than the skin, and all of them apart
        ([0.0, 0.0, 0.0], -0.10, False),  # 6.88 A become 6.2 A
        ([0.0, 0.0, 0.0], -0.16, True),  # 6.88 A become 5.8 A: edges are missing
        ([float("nan"), 0.0, 0.0], 0.0, True),
    ],
)
def test_all_ranks_agree_when_one_atom_of_one_rank_has_moved_too_far(pool, displacement, strain, too_far):
    batch = structure("bulk several cutoffs long")
    assert pool.run(3, judge_motion, batch, 5, displacement, strain) == [too_far] * 3


# --- memory and pieces
# ----------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements any operation returned."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


def largest_tensor(group, cells_per_rank: int) -> tuple[int, int]:
    """Build a plan of a long rod of which each rank makes a piece itself; return bytes and ghosts."""
    ranks = Ranks(group)
    piece = bulk("Ag", "fcc", a=4.09, cubic=True) * (2, 2, cells_per_rank)
    whole = piece.cell.array * [[1], [1], [ranks.size]]
    n = len(piece)
    piece.set_cell(whole)
    piece.positions[:, 2] += ranks.rank * whole[2, 2] / ranks.size
    batch = AtomBatch.from_ase(piece)
    memory = LargestTensor()
    with memory:
        plan = build_plan(batch, torch.arange(n) + ranks.rank * n, R_CUT, ranks, backend="torch")
    return memory.largest, plan.gp.n_ghost


def test_memory_per_rank_does_not_grow_with_the_number_of_ranks(pool):
    few, many = (pool.run(size, largest_tensor, 6) for size in (3, 6))
    assert max(m for m, _ in many) <= 1.2 * max(m for m, _ in few)
    assert all(ghosts > 0 for _, ghosts in many)


class RowsOfAll(TorchDispatchMode):
    """Notes what gives a rank a row for each of N atoms: tensors of N rows, all-gathers, long mail."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.found: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and self.n in x.shape:
                self.found.add(str(function))
        if "allgather" in str(function) or "alltoall" in str(function) and len(args[0]) >= self.n:
            self.found.add(str(function))
        return out


def rows_of_all(group, gather: bool) -> set[str]:
    """Build, judge, rebuild and evaluate a plan of a rod, of which each rank makes a piece itself."""
    ranks, r_cut = Ranks(group), R_CUT
    piece = bulk("Ag", "fcc", a=4.09, cubic=True) * (2, 2, 6)
    whole = piece.cell.array * [[1], [1], [ranks.size]]
    n = len(piece)
    piece.rattle(0.1, seed=ranks.rank)
    piece.set_cell(whole)
    piece.positions[:, 2] += ranks.rank * whole[2, 2] / ranks.size
    batch = AtomBatch.from_ase(piece)
    with RowsOfAll(n * ranks.size) as rows:
        plan = build_plan(batch, torch.arange(n) + ranks.rank * n, r_cut, ranks, skin=0.3, backend="torch")
        moved = plan.positions + 0.2
        assert plan.moved_too_far(moved, batch.cell)
        plan = plan.rebuild(moved, batch.cell)
        p = emt().eval()(moved, plan.within_cutoff(moved, batch.cell), plan.gp)
        if gather:
            plan.gather_owned(p.forces)
    return rows.found


def test_no_rank_ever_has_a_row_for_every_atom(pool):
    """Edges outnumber atoms, so the largest tensor alone would not tell."""
    assert pool.run(4, rows_of_all, False) == [set()] * 4
    assert all(
        "allgather" in str(found) and "new_empty" in str(found) for found in pool.run(4, rows_of_all, True)
    )


def pieces_in_disorder(group, batch: AtomBatch) -> tuple[float, torch.Tensor]:
    """Everything is on rank 1 at first, in another order, with its velocities."""
    ranks = Ranks(group)
    n = len(batch.numbers) if ranks.rank == 1 else 0
    order = torch.randperm(len(batch.numbers), generator=torch.Generator().manual_seed(3))[:n]
    piece = replace(
        batch,
        positions=batch.positions[order],
        numbers=batch.numbers[order],
        system=batch.system[order],
        forces=batch.forces[order],
    )
    velocities = batch.positions[order].roll(1, dims=1)
    plan = build_plan(piece, order, R_CUT, ranks, carried=(velocities,))
    p = emt().eval()(plan.positions, plan.graph, plan.gp)
    return float(p.energy.sum()), plan.gather_owned(plan.carried[0])


def test_atoms_may_start_anywhere_and_carry_their_velocities_along(pool):
    batch = structure("batch")
    for energy, velocities in pool.run(4, pieces_in_disorder, batch):
        assert energy == pytest.approx(float(single_energy(batch)[0].sum()), abs=1e-9)
        assert torch.equal(velocities, batch.positions.roll(1, dims=1))


def rows_of_plan(group, batch: AtomBatch, ranks_first: bool) -> list[int]:
    ranks = Ranks(group)
    piece, ids = share_of(batch, ranks)
    if ranks_first:  # the same atoms, dealt like cards
        ids = torch.arange(ranks.rank, len(batch.numbers), ranks.size)
        piece = replace(
            batch,
            positions=batch.positions[ids],
            numbers=batch.numbers[ids],
            system=batch.system[ids],
            forces=batch.forces[ids],
        )
    return build_plan(piece, ids, R_CUT, ranks).ids.tolist()


def test_a_plan_does_not_depend_on_who_held_which_atom_before(pool):
    batch = structure("batch")
    assert pool.run(3, rows_of_plan, batch, False) == pool.run(3, rows_of_plan, batch, True)


def changing_systems(group) -> list[float]:
    """Number of atoms, species, cell, periodicity change from call to call."""
    errors = []
    for name in (
        "molecule",
        "bulk several cutoffs long",
        "lone atom",
        "slab with vacuum",
        "one primitive cell",
    ):
        batch = structure(name)
        plan = plan_of(group, batch)
        p = emt().eval()(plan.positions, plan.graph, plan.gp)
        errors.append(float((p.energy - single_energy(batch)[0]).abs().max()))
    return errors


def test_nothing_of_the_previous_structure_remains(pool):
    assert all(max(errors) < 1e-10 for errors in pool.run(2, changing_systems))


# --- guards
# ---------------------------------------------------------------------------------------------------


def failing_rank(group, fault: str) -> tuple[str, float]:
    ranks = Ranks(group)
    piece, ids = share_of(structure("bulk several cutoffs long"), ranks)
    if ranks.rank == 1:
        if fault == "nan":
            piece.positions[3, 1] = torch.nan
        elif fault == "numbers":
            piece = replace(piece, numbers=piece.numbers[:-1])
        elif fault == "twice":
            ids = ids.clone()
            ids[0] = 0
    start = time.monotonic()
    try:
        build_plan(piece, ids, R_CUT, ranks)
    except (RankFailure, ValueError) as error:
        return str(error), time.monotonic() - start
    return "", 0.0


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nan", "rank 1 of 3 failed while checking its atoms: ValueError: atom 67 is at"),
        ("numbers", "rank 1 of 3 failed while checking its atoms: ValueError: ids, numbers"),
        ("twice", "an atom is missing or was given to two ranks"),
    ],
)
def test_bad_input_of_one_rank_raises_on_every_rank_within_seconds(pool, fault, message):
    for found, seconds in pool.run(3, failing_rank, fault):
        assert message in found
        assert seconds < 5


def damaged_plan(group, damage: str) -> str:
    plan = plan_of(group, structure("bulk several cutoffs long"))
    graph, gp, ids = plan.graph, plan.gp, plan.ids
    if plan.ranks.rank == 0:
        if damage == "wrong row":
            index = gp.send_idx.clone()
            index[0] = (index[0] + 1) % gp.n_owned
            gp = replace(gp, send_idx=index)
        elif damage == "lost edge":
            at = int((graph.edge_index[0] >= gp.n_owned).nonzero()[0])
            keep = torch.arange(graph.edge_index.shape[1]) != at
            graph = replace(graph, edge_index=graph.edge_index[:, keep])
        elif damage == "lost atom":
            ids = ids.clone()
            ids[0] = ids[1]
    try:
        check_share(graph, gp, ids, plan.ranks, symmetric=True)
    except (RankFailure, ValueError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("none", ""),
        ("wrong row", "ghosts receive other atoms' rows"),
        ("lost edge", "the halo is incomplete"),
        ("lost atom", "missing or was given to two ranks"),
    ],
)
def test_a_damaged_plan_is_refused_by_every_rank(pool, damage, message):
    for found in pool.run(3, damaged_plan, damage):
        assert (message in found) if message else found == ""


def test_unknown_partition_is_refused_with_the_choices():
    batch = AtomBatch.from_ase(Atoms("Ag", cell=np.eye(3) * 9, pbc=True))
    with pytest.raises(ValueError, match="'auto', 'bisection'"):
        build_plan(batch, torch.arange(1), R_CUT, Ranks(), partition="metis")


def test_one_rank_has_no_ghosts_and_the_same_edges():
    batch = structure("batch")
    plan = build_plan(*share_of(batch, Ranks()), R_CUT, Ranks())
    assert plan.gp.n_ghost == 0
    assert plan.gp.group is None
    length = torch.linalg.vector_norm(
        edge_vectors(plan.graph.with_positions(plan.positions, batch.cell)), dim=1
    )
    reference = emt().graph(batch)
    expected = torch.linalg.vector_norm(
        edge_vectors(reference.with_positions(batch.positions, batch.cell)), dim=1
    )
    torch.testing.assert_close(length.sort().values, expected.sort().values)
