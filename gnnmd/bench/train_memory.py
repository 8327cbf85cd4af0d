"""Measure the memory of a training step on one large silver frame that ranks share.

``python -m gnnmd.bench.train_memory --ranks 1 2 4`` prints one JSON line per number of ranks: atoms, edges
and memory of the rank that has most of each. The ranks run side by side on the CPU.
"""

import argparse
import json
import resource

import torch
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from torch_geometric.data import Batch

from gnnmd.data.dataset import AtomsDataset
from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.escn_md import EscnMDConfig
from gnnmd.parallel import Mesh, Ranks, Workers
from gnnmd.training.losses import LossConfig, TermConfig, loss_sums, weighted_sum
from gnnmd.training.module import labelled_graph
from gnnmd.training.strategy import reduce_gradients


def main() -> None:
    """Run every number of ranks in processes of its own, so that the peak memory belongs to it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeat", type=int, default=17, help="4 n^3 atoms")
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--edge-chunk", type=int, default=None)
    options = parser.parse_args()
    from gnnmd.bench.train_memory import measure  # by its importable name, not as __main__'s

    for n in options.ranks:
        with Workers(n) as workers:
            rows = workers.call(measure, options.repeat, options.channels, options.edge_chunk)
        most = {name: max(row[name] for row in rows) for name in rows[0]}
        print(json.dumps({"ranks": n, "atoms": 4 * options.repeat**3, **most}), flush=True)


def measure(ranks: Ranks, repeat: int, channels: int, edge_chunk: int | None) -> dict[str, int]:
    """Take one training step (energy and forces, float32) together; return this rank's counts and memory."""
    atoms = bulk("Ag", "fcc", a=4.09, cubic=True) * (repeat, repeat, repeat)
    atoms.rattle(0.1, seed=0)
    atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=atoms.positions * 0)
    torch.manual_seed(0)
    model = EscnMDConfig(
        lmax=2, mmax=2, num_layers=2, channels=channels, hidden_channels=channels, edge_channels=channels
    )
    potential = build_potential(PotentialConfig(model))
    potential.backbone.edge_chunk = edge_chunk
    mesh = Mesh(ranks, ranks) if ranks.size > 1 else Mesh()
    loss, weights = LossConfig(stress=TermConfig(weight=0.0)), {"energy": 1.0, "forces": 1.0}
    before = _peak()
    dataset = AtomsDataset([atoms], potential.r_cut, edges="keep" if ranks.size == 1 else "skip")
    batch = labelled_graph(potential, Batch.from_data_list([dataset[0]]), mesh.gp)
    planned = _peak()
    prediction = potential.train()(batch.labels.positions, batch.graph, batch.gp, stress=False)
    sums = loss_sums(loss, set(weights), prediction, batch.labels, batch.graph.n_atoms)
    weighted_sum(sums, weights, batch.gp, mesh).backward()
    reduce_gradients(list(potential.parameters()), mesh)
    return {
        "owned": batch.gp.n_owned,
        "ghosts": batch.gp.n_ghost,
        "edges": batch.graph.edge_index.shape[1],
        "mb_before": before,
        "mb_after_graph": planned,
        "mb_after_step": _peak(),
    }


def _peak() -> int:
    """Return the largest resident memory so far, MB (VmHWM)."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


if __name__ == "__main__":
    main()
