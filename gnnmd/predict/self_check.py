"""Whether a potential and the machine it runs on do on one system what physics and arithmetic demand.

Everything is evaluated in float64 unless it is float32 that is checked. Limits are relative to the largest
entry of what is compared, at least 1 (eV, eV/A, eV/A^3). The reference is one rank in this process.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from gnnmd.data.checks import closest_pair
from gnnmd.graph import AtomBatch
from gnnmd.graph.geometry import volume
from gnnmd.models.escn_md import EscnMDConfig
from gnnmd.models.potential import Potential, Prediction
from gnnmd.parallel import Ranks, Workers
from gnnmd.predict.evaluation import on_cpu
from gnnmd.predict.settings import InferenceSettings
from gnnmd.predict.unit import PredictUnit

#: Sums in another order: ranks, rotations, permutations.
SAME = 1e-10
#: Rotations of networks that sample a sphere on a grid: aliasing, up to 1e-2 eV/A with random weights.
SAME_ON_A_GRID = 1e-2
#: Largest deviations from differences of energies: eV/A and eV/A^3.
SLOPE_FORCES, SLOPE_STRESS = 1e-7, 1e-8
#: Net force per atom, eV/A, and a sum against its terms per atom, eV.
SUM = 1e-12
#: float32 against float64: eV/atom, eV/A, eV/A^3.
SINGLE_ENERGY, SINGLE_FORCES, SINGLE_STRESS = 1e-5, 1e-4, 1e-5

#: Largest displacement (Angstrom) and strain of the differences; their error is of fourth order in it.
STEP = 1e-3
#: Atoms whose forces are checked one by one.
N_ATOMS = 3
#: Where all forces are below (eV/A), atoms are displaced by about DISPLACEMENT (Angstrom) first.
NO_FORCE, DISPLACEMENT = 1e-3, 0.05
#: Atoms nearer than this are mentioned, Angstrom.
CLOSEST = 0.5

OWN_HEAD = "not demanded: {} from a head, not a derivative"


@dataclass(frozen=True)
class Finding:
    """One line of the result.

    Attributes:
        name: what was checked.
        passed: None where there is nothing to demand: a fact, or a warning.
        found: the number that was found, if it is one.
        limit: the largest that passes.
        unit: of both.
        remark: what else there is to say; the message of a check that raised.
    """

    name: str
    passed: bool | None = None
    found: float | None = None
    limit: float | None = None
    unit: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Share:
    """What one rank of many says.

    Attributes:
        ids: ``[n_owned]`` int64, the atoms it owns.
        prediction: energy and stress of the system, forces and energies of these atoms.
        n_ghosts: atoms it copies from other ranks.
        n_edges: edges that end on its atoms.
    """

    ids: Tensor
    prediction: Prediction
    n_ghosts: int
    n_edges: int


def default_ranks(device: torch.device) -> list[int]:
    """Return 1, 2 and 4 ranks, or as many of these as there are GPUs for."""
    most = torch.cuda.device_count() if device.type == "cuda" else 4
    return [n for n in (1, 2, 4) if n <= most]


def self_check(
    potential: Potential,
    batch: AtomBatch,
    *,
    device: str | None = None,
    ranks: Sequence[int] | None = None,
) -> Iterator[Finding]:
    """Check a potential on one system, and yield every finding as soon as it is known.

    A check that raises is a failed one, and the others go on.

    Args:
        potential: the model, on the CPU.
        batch: one system.
        device: where to compute; None takes a GPU if there is one.
        ranks: numbers of ranks that must agree with one; None is `default_ranks`.

    Raises:
        ValueError: ranks that cannot be started here, or a system that the potential cannot describe.
    """
    potential = copy.deepcopy(potential).double().eval().requires_grad_(False)
    unit = PredictUnit(potential, device=device, settings=InferenceSettings(dtype="float64"))
    ranks = default_ranks(unit.device) if ranks is None else sorted(set(ranks))
    _check_ranks(ranks, unit.device)
    expected = _evaluate(unit, batch)
    pair = closest_pair(batch.positions.numpy(), batch.cell[0].numpy(), batch.pbc[0].numpy(), CLOSEST)
    if pair:
        yield Finding("note", remark="atoms {} and {} are only {:.3g} A apart".format(*pair))
    if len(batch.numbers) > 1 and float(expected.forces.abs().max()) < NO_FORCE:
        yield Finding(
            "note",
            remark=f"all forces are below {NO_FORCE:g} eV/A, and zeros agree with everything: atoms were "
            f"displaced by about {DISPLACEMENT} A at random",
        )
        batch = replace(batch, positions=batch.positions + DISPLACEMENT * _random(batch.positions.shape))
        expected = _evaluate(unit, batch)
    if ranks == [1]:
        yield Finding("note", remark="one rank only, so nothing is said about several; see --ranks")

    for name, findings in (
        ("energy = sum of atoms", _sum_of_atoms),
        ("forces = -dE/dx", _forces_by_differences),
        ("stress = dE/dstrain / V", _stress_by_differences),
        ("sum of forces", _sum_of_forces),
        ("translation", _translation),
        ("rotation", _rotation),
        ("permutation", _permutation),
        ("float32", _float32),
    ):
        yield from _guarded(name, partial(findings, name, unit, batch, expected))
    for n in ranks:
        name = f"{n} ranks" if n > 1 else "1 rank"
        yield from _guarded(name, partial(_ranks, name, n, unit.device.type, potential, batch, expected))


def evaluate_share(ranks: Ranks, potential: Potential, batch: AtomBatch) -> Share:
    """Evaluate a system together with other ranks; collective, what `self_check` runs on each."""
    potential, batch = potential.to(ranks.device), batch.to(ranks.device)
    plan = potential.plan(batch, ranks)
    p = potential(plan.positions, plan.graph, plan.gp)
    ids = plan.ids[: plan.gp.n_owned].cpu()
    return Share(ids, on_cpu(p), plan.gp.n_ghost, plan.graph.edge_index.shape[1])


def _check_ranks(ranks: Sequence[int], device: torch.device) -> None:
    if not ranks or min(ranks) < 1:
        raise ValueError(f"ranks must be positive numbers, e.g. 1,2,4; got {list(ranks)}")
    if device.type == "cuda" and max(ranks) > torch.cuda.device_count():
        raise ValueError(
            f"{max(ranks)} ranks need as many GPUs, but torch sees {torch.cuda.device_count()}. Ask for "
            "fewer ranks, or use the CPU (--device cpu)"
        )


def _guarded(name: str, findings: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from findings()
    except Exception as error:
        yield Finding(name, passed=False, remark=f"{type(error).__name__}: {error}")


def _compared(name: str, found: Tensor, expected: Tensor, limit: float, unit: str) -> Finding:
    """Compare two tensors entry by entry, relative to the largest of the expected ones."""
    scale = max(1.0, float(expected.abs().max()))
    return _limited(name, float((found - expected).abs().max()), limit * scale, unit)


def _limited(name: str, found: float, limit: float, unit: str, remark: str = "") -> Finding:
    return Finding(name, found <= limit, found, limit, unit, remark)  # NaN fails


def _random(shape: Sequence[int], seed: int = 0) -> Tensor:
    """Return normal random numbers, the same at every run and on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _evaluate(unit: PredictUnit, batch: AtomBatch) -> Prediction:
    """Return the prediction, without a stress where there is no volume."""
    prediction = unit.evaluate(batch)
    return prediction if volume(batch.cell) > 0 else replace(prediction, stress=None)


def _sum_of_atoms(name: str, unit: PredictUnit, batch: AtomBatch, expected: Prediction) -> Iterator[Finding]:
    """Slopes are those of the atoms' energies, which large sums do not round; so this has to hold too."""
    energies = expected.node_energies
    found = float((energies.sum() - expected.energy[0]).abs()) / len(energies)
    yield _limited(name, found, SUM * max(1.0, float(energies.abs().max())), "eV/atom")


def _slope(node_energies: Callable[[float], Tensor]) -> float:
    """Return dE/ds at s = 0 from four energies."""

    def central(s: float) -> float:
        return float((node_energies(s) - node_energies(-s)).sum()) / (2 * s)

    return (4 * central(STEP / 2) - central(STEP)) / 3


def _forces_by_differences(
    name: str, unit: PredictUnit, batch: AtomBatch, expected: Prediction
) -> Iterator[Finding]:
    """Move some atoms one by one, then all of them at once, which no wrong force escapes."""
    n = len(batch.numbers)
    atoms = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:N_ATOMS].tolist()
    directions = {f"atom {i}": _one_atom(n, i) for i in atoms}
    directions["all atoms at once"] = _random((n, 3), seed=1) / 3**0.5
    deviations = torch.zeros(len(directions), dtype=torch.float64)
    for k, d in enumerate(directions.values()):

        def node_energies(s: float, d: Tensor = d) -> Tensor:
            return unit.evaluate(replace(batch, positions=batch.positions + s * d)).node_energies

        deviations[k] = (_slope(node_energies) + float((expected.forces * d).sum())) / d.norm()
    found = float(deviations.abs().max())
    if "forces" in unit.potential.heads:
        yield Finding(name, None, found, unit="eV/A", remark=OWN_HEAD.format("forces are"))
        return
    worst = list(directions)[int(deviations.abs().argmax())]
    limit = SLOPE_FORCES * max(1.0, float(expected.forces.abs().max()))
    yield _limited(name, found, limit, "eV/A", f"{len(directions)} directions, worst: {worst}")


def _one_atom(n: int, i: int) -> Tensor:
    """Return ``[n, 3]`` with a random unit vector in row i."""
    d = torch.zeros(n, 3, dtype=torch.float64)
    direction = _random((3,), seed=i)
    d[i] = direction / direction.norm()
    return d


def _stress_by_differences(
    name: str, unit: PredictUnit, batch: AtomBatch, expected: Prediction
) -> Iterator[Finding]:
    if expected.stress is None or not batch.pbc.any():
        yield Finding(name, remark="not checked: no periodic cell with a volume, or a model without stress")
        return
    deviations = torch.zeros(3, 3, dtype=torch.float64)
    for a, b in torch.triu_indices(3, 3).T.tolist():
        strain = torch.zeros(3, 3, dtype=torch.float64)
        strain[a, b] += 0.5
        strain[b, a] += 0.5

        def node_energies(s: float, strain: Tensor = strain) -> Tensor:
            f = torch.eye(3, dtype=torch.float64) + s * strain
            moved = replace(batch, positions=batch.positions @ f, cell=batch.cell @ f)
            return unit.evaluate(moved).node_energies

        slope = _slope(node_energies) / float(volume(batch.cell))
        deviations[a, b] = slope - (expected.stress[0] * strain).sum()
    found = float(deviations.abs().max())
    if {"forces", "stress"} & set(unit.potential.heads):
        yield Finding(name, None, found, unit="eV/A^3", remark=OWN_HEAD.format("stress is"))
        return
    a, b = divmod(int(deviations.abs().argmax()), 3)
    limit = SLOPE_STRESS * max(1.0, float(expected.stress.abs().max()))
    yield _limited(name, found, limit, "eV/A^3", f"6 components, worst: {'xyz'[a]}{'xyz'[b]}")


def _sum_of_forces(name: str, unit: PredictUnit, batch: AtomBatch, expected: Prediction) -> Iterator[Finding]:
    forces = expected.forces
    found = float(forces.sum(0).abs().max()) / len(forces)
    if "forces" in unit.potential.heads:
        yield Finding(name, None, found, unit="eV/A/atom", remark=OWN_HEAD.format("forces are"))
    else:
        yield _limited(name, found, SUM * max(1.0, float(forces.abs().max())), "eV/A/atom")


def _translation(name: str, unit: PredictUnit, batch: AtomBatch, expected: Prediction) -> Iterator[Finding]:
    """Move everything, and every atom to a periodic image of its own."""
    images = (2 * _random(batch.positions.shape, seed=2)).round() * batch.pbc
    positions = batch.positions + 10 * _random((3,), seed=3) + images @ batch.cell[0]
    yield from _same(name, unit.evaluate(replace(batch, positions=positions)), expected, SAME)


def _rotation(name: str, unit: PredictUnit, batch: AtomBatch, expected: Prediction) -> Iterator[Finding]:
    q = torch.linalg.qr(_random((3, 3), seed=4)).Q
    r = q * torch.linalg.det(q)  # a proper rotation: eSCN-MD knows left from right
    found = unit.evaluate(replace(batch, positions=batch.positions @ r.T, cell=batch.cell @ r.T))
    stress = None if expected.stress is None else r @ expected.stress @ r.T
    turned = replace(expected, forces=expected.forces @ r.T, stress=stress)
    yield from _same(name, found, turned, SAME_ON_A_GRID if _has_grid(unit.potential) else SAME)


def _has_grid(potential: Potential) -> bool:
    model = getattr(potential.config, "model", None)  # None: not built from a configuration
    return isinstance(model, EscnMDConfig) and (model.feed_forward == "grid" or model.activation == "s2")


def _permutation(name: str, unit: PredictUnit, batch: AtomBatch, expected: Prediction) -> Iterator[Finding]:
    order = torch.randperm(len(batch.numbers), generator=torch.Generator().manual_seed(5))
    found = unit.evaluate(replace(batch, positions=batch.positions[order], numbers=batch.numbers[order]))
    yield from _same(name, found, replace(expected, forces=expected.forces[order]), SAME)


def _float32(name: str, unit: PredictUnit, batch: AtomBatch, expected: Prediction) -> Iterator[Finding]:
    """Compare the arithmetic of ordinary use; on GPUs also TF32, which nobody gets without asking."""
    limits = {"energy": SINGLE_ENERGY, "forces": SINGLE_FORCES, "stress": SINGLE_STRESS}

    def in_single_precision(tf32: bool) -> Prediction:
        settings = InferenceSettings(dtype="float32", tf32=tf32)
        return PredictUnit(unit.potential, device=unit.device, settings=settings).evaluate(batch)

    yield from _same(name, in_single_precision(tf32=False), expected, limits)
    if unit.device.type == "cuda":
        for finding in _same("tf32", in_single_precision(tf32=True), expected, limits):
            yield replace(finding, passed=None, limit=None, remark="if it is asked for")


def _same(
    name: str, found: Prediction, expected: Prediction, limit: float | Mapping[str, float]
) -> Iterator[Finding]:
    """Compare energy per atom, forces and, if there is one, stress; one limit or one for each."""
    n = len(expected.forces)
    for what, unit, mine, theirs in (
        ("energy", "eV/atom", found.energy / n, expected.energy / n),
        ("forces", "eV/A", found.forces, expected.forces),
        ("stress", "eV/A^3", found.stress, expected.stress),
    ):
        if mine is not None and theirs is not None:
            largest = limit[what] if isinstance(limit, Mapping) else limit
            yield _compared(f"{name}: {what}", mine, theirs, largest, unit)


def _ranks(
    name: str, n: int, device: str, potential: Potential, batch: AtomBatch, expected: Prediction
) -> Iterator[Finding]:
    """Compare n ranks, each with its share of the system, with one that has no plan at all."""
    if n == 1 and device == "cpu":
        shares = [evaluate_share(Ranks(), potential, batch)]
    else:
        torch.cuda.empty_cache()  # the first worker computes on this process's GPU
        with Workers(n, device) as workers:
            shares = workers.call(evaluate_share, potential, batch)
    yield Finding(f"{name}: plan", passed=True, remark=_summary(shares))
    if n > 1 and all(len(s.ids) + s.n_ghosts == len(batch.numbers) for s in shares):
        cure = ". Repeat the cell (--repeat) until there are fewer copies" if batch.pbc.any() else ""
        yield Finding("note", remark=f"every rank has a copy of every atom, which hides faults{cure}")
    found = _joined(shares, expected)
    yield from _same(name, found, expected, SAME)
    yield _compared(f"{name}: node energies", found.node_energies, expected.node_energies, SAME, "eV")


def _joined(shares: Sequence[Share], like: Prediction) -> Prediction:
    """Put the atoms of all ranks in their order, and every rank's energy and stress one below the other."""
    forces, node_energies = (torch.full_like(x, torch.nan) for x in (like.forces, like.node_energies))
    for share in shares:
        forces[share.ids] = share.prediction.forces
        node_energies[share.ids] = share.prediction.node_energies
    stresses = [s.prediction.stress for s in shares if s.prediction.stress is not None]
    return Prediction(
        energy=torch.cat([s.prediction.energy for s in shares]),
        forces=forces,
        stress=torch.cat(stresses) if stresses else None,
        node_energies=node_energies,
    )


def _summary(shares: Sequence[Share]) -> str:
    ghosts, n_atoms = [s.n_ghosts for s in shares], sum(len(s.ids) for s in shares)
    owned, edges = _range([len(s.ids) for s in shares]), _range([s.n_edges for s in shares])
    per_rank = f"{owned} owned, {_range(ghosts)} ghosts, {edges} edges"
    return f"{per_rank} per rank; {sum(ghosts) / n_atoms:.2f} ghosts per atom"


def _range(counts: Sequence[int]) -> str:
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)}-{max(counts)}"
