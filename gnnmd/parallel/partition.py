"""Who owns which atom: P-1 cuts that every rank keeps, found without any rank seeing all atoms.

A partitioner is a function ``(sites, n_parts, reach, ranks) -> Cuts``. All of them cut atoms in two by an
integer key, again and again, at the place where the work is divided as the numbers of ranks on both sides
are; they differ in the keys.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gnnmd.parallel.morton import morton_keys
from gnnmd.parallel.ranks import Ranks
from gnnmd.parallel.sites import Sites

#: Bits of the coordinate an axis key starts with, and of each of the other two that break ties (perfect
#: crystals).
AXIS_BITS, TIE_BITS = 26, 18
#: Bits found per all-reduce when a threshold is searched.
DIGIT_BITS = 9
#: Systems' ends attract rank boundaries that are nearer than this part of a rank's work: no sliver of a
#: molecule on another rank.
SNAP = 0.02


@dataclass(frozen=True)
class Cuts:
    """A binary tree over keys; its leaves are ranks.

    Attributes:
        keys: which keys the thresholds refer to ("axes", "morton" or "index").
        root: ``[B]`` int64, first node of each system; -1 - rank where one rank owns the whole system.
        column: ``[n]`` int64, which key (axis) each node compares.
        threshold: ``[n]`` int64; smaller keys go to child 0, others to child 1.
        child: ``[n, 2]`` int64, the next node, or -1 - rank.
        depth: comparisons from root to the deepest leaf.
    """

    keys: str
    root: Tensor
    column: Tensor
    threshold: Tensor
    child: Tensor
    depth: int

    def owner(self, sites: Sites) -> Tensor:
        """Return ``[n]`` int64, the rank that owns each atom."""
        keys = KEYS[self.keys](sites)
        node = self.root[sites.system]
        for _ in range(self.depth):
            inner = node.clamp(min=0)
            key = keys.gather(1, self.column[inner, None])[:, 0]
            below = self.child[inner, (key >= self.threshold[inner]).long()]
            node = torch.where(node < 0, node, below)
        return -1 - node


Partitioner = Callable[[Sites, int, float, Ranks], Cuts]


def morton(sites: Sites, n_parts: int, reach: float, ranks: Ranks) -> Cuts:
    """Cut the Z-order curve into pieces of equal work."""
    return _split("morton", sites, n_parts, reach, ranks)


def bisection(sites: Sites, n_parts: int, reach: float, ranks: Ranks) -> Cuts:
    """Cut space by planes, each along the axis that makes the fewest ghosts; periodic faces count.

    Args:
        sites: the atoms this rank holds.
        n_parts: number of ranks that will own them.
        reach: how far edges reach, Angstrom.
        ranks: who holds the other atoms.
    """
    return _split("axes", sites, n_parts, reach, ranks)


def bricks(sites: Sites, n_parts: int, reach: float, ranks: Ranks) -> Cuts:
    """Cut space into the grid of bricks with the smallest halo, its planes shifted to divide the work.

    `bisection` looks one cut ahead and misses that six bars (3 x 2 x 1) beat six slabs.
    """
    _, _, first, last = _shares(sites, n_parts, ranks)
    rows = zip((last - first + 1).tolist(), sites.box.height.tolist(), sites.box.seam.tolist(), strict=True)
    shape = torch.tensor(
        [_brick_shape(n, height, seam, reach) for n, height, seam in rows], device=first.device
    )
    return _split("axes", sites, n_parts, reach, ranks, shape)


def index(sites: Sites, n_parts: int, reach: float, ranks: Ranks) -> Cuts:
    """Cut the list of atoms as it was given: the baseline that knows nothing of space."""
    return _split("index", sites, n_parts, reach, ranks)


def choose(
    name: str,
    sites: Sites,
    n_parts: int,
    reach: float,
    ranks: Ranks,
    count_ghosts: Callable[[Tensor], Tensor],
) -> Cuts:
    """Return the cuts of a named partitioner, or for "auto" those whose worst rank has the fewest ghosts.

    Args:
        name: "auto" or a key of `PARTITIONERS`.
        sites: the atoms this rank holds.
        n_parts: number of ranks that will own them.
        reach: how far edges reach, Angstrom.
        ranks: who holds the other atoms.
        count_ghosts: from the owner of each atom ``[n]`` to the number of ghosts of each rank ``[P]``.
    """
    if name != "auto":
        return PARTITIONERS[name](sites, n_parts, reach, ranks)
    candidates = [PARTITIONERS[c](sites, n_parts, reach, ranks) for c in AUTO]
    most = [int(count_ghosts(cuts.owner(sites)).max()) for cuts in candidates]
    return candidates[most.index(min(most))]


#: Partitioners by the name a user gives.
PARTITIONERS: dict[str, Partitioner] = {
    "bisection": bisection,
    "bricks": bricks,
    "morton": morton,
    "index": index,
}

#: Partitioners that "auto" tries.
AUTO = ("bisection", "bricks", "morton")


def _axis_keys(sites: Sites) -> Tensor:
    fine = (sites.u * 2.0**AXIS_BITS).long()
    tie = (sites.u * 2.0**TIE_BITS).long()
    columns = [
        ((fine[:, a] << TIE_BITS | tie[:, (a + 1) % 3]) << TIE_BITS) | tie[:, (a + 2) % 3] for a in range(3)
    ]
    return torch.stack(columns, 1)


#: Keys ``[n, K]`` int64 >= 0 of atoms: one column per way to cut.
KEYS: dict[str, Callable[[Sites], Tensor]] = {
    "axes": _axis_keys,
    "morton": lambda sites: morton_keys(sites.u, sites.box.edge, sites.system)[:, None],
    "index": lambda sites: sites.id[:, None],
}


def _brick_shape(n_parts: int, height: list[float], seam: list[float], reach: float) -> tuple[int, int, int]:
    """Return how often to divide each axis so that ``n_parts`` bricks have the fewest ghosts by volume."""

    def halo(shape: tuple[int, int, int]) -> float:
        inside = outside = 1.0
        for parts, length, gap in zip(shape, height, seam, strict=True):
            # A brick in the middle has two neighbours along an axis; one of two bricks has only one across
            # vacuum.
            sides = 0 if parts == 1 else 1 if parts == 2 and gap > reach else 2
            inside *= length / parts
            outside *= length / parts + sides * reach
        return outside - inside

    divisors = [d for d in range(1, n_parts + 1) if n_parts % d == 0]
    shapes = [(a, b, n_parts // (a * b)) for a in divisors for b in divisors if n_parts % (a * b) == 0]
    return min(shapes, key=halo)


def _split(
    name: str, sites: Sites, n_parts: int, reach: float, ranks: Ranks, shape: Tensor | None = None
) -> Cuts:
    """Build the tree level by level; all nodes of a level, of all systems, at once.

    Nodes are cut along the axis that makes the fewest ghosts, or so that in the end ``shape`` ``[B, 3]``
    pieces lie along the axes of each system.
    """
    keys, weight, u, node = KEYS[name](sites), sites.weight, sites.u, sites.system
    n_keys = keys.shape[1]
    copies = torch.zeros_like(weight)  # how many ranks hold a copy of the atom, by the cuts so far
    bounds, start, first, last = _shares(sites, n_parts, ranks)
    system = torch.arange(len(start), device=u.device)
    whole = sites.box.pbc.clone()  # [nodes, 3] periodic axes that were not cut yet

    root = links = torch.empty_like(first)  # where the numbers of this level's nodes are written
    columns, thresholds, children = [], [], []
    n_nodes = depth = 0
    while True:
        inner = last > first
        place = inner.cumsum(0) - 1
        links.copy_(torch.where(inner, n_nodes + place, -1 - first))
        n_inner = int(inner.sum())
        if not n_inner:
            break
        n_nodes, depth = n_nodes + n_inner, depth + 1
        here = inner[node]
        keys, weight, u, copies, node = keys[here], weight[here], u[here], copies[here], place[node[here]]
        start, first, last, system, whole = (x[inner] for x in (start, first, last, system, whole))

        middle = (first + last + 1) // 2  # first rank of the upper half
        if shape is not None:
            shape = shape[inner]
            parts, along = shape.max(1)
            middle = first + (last - first + 1) // parts * (parts // 2)
        target = bounds[middle - 1] - start
        threshold, below = _find_thresholds(keys, node, weight, target, ranks)  # [nodes, K]
        if shape is not None:
            column = along
            lower = shape.scatter(1, along[:, None], (parts // 2)[:, None])
            rest = shape.scatter(1, along[:, None], (parts - parts // 2)[:, None])
            shape = torch.stack((lower, rest), 1).view(-1, 3)
        elif n_keys == 1:
            column = torch.zeros_like(first)
        else:
            near = _near_planes(u, threshold, node, whole, system, sites, reach)  # [n, 3]
            cost = near.new_zeros(n_inner, 3, dtype=torch.int64).index_add(
                0, node, near * (1 + copies)[:, None]
            )
            column = ranks.sum(cost).argmin(1)
            copies = copies + near.gather(1, column[node, None])[:, 0] * (1 + copies)
            whole = whole.scatter(1, column[:, None], False)
        threshold, below = (x.gather(1, column[:, None])[:, 0] for x in (threshold, below))

        upper = keys.gather(1, column[node, None])[:, 0] >= threshold[node]
        child = torch.empty(n_inner, 2, dtype=torch.int64, device=u.device)
        columns.append(column)
        thresholds.append(threshold)
        children.append(child)
        links = child.view(-1)
        node = 2 * node + upper
        start = torch.stack((start, start + below), 1).view(-1)
        first, last = torch.stack((first, middle), 1).view(-1), torch.stack((middle - 1, last), 1).view(-1)
        system, whole = system.repeat_interleave(2), whole.repeat_interleave(2, 0)
    none = torch.zeros(1, dtype=torch.int64, device=u.device)  # a tree of leaves still has a row to index
    return Cuts(
        keys=name,
        root=root,
        column=torch.cat([*columns, none]),
        threshold=torch.cat([*thresholds, none]),
        child=torch.cat([*children, none[:, None].expand(1, 2)]),
        depth=depth,
    )


def _shares(sites: Sites, n_parts: int, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lay the systems' work end to end and divide it into equal pieces.

    Returns:
        ``[P-1]`` work before each rank but the first; for each system ``[B]`` the work before it, and the
        first and last rank that share it.
    """
    work = sites.weight.new_zeros(len(sites.box.edge)).index_add(0, sites.system, sites.weight)
    end = ranks.sum(work).cumsum(0)
    begin = torch.cat((end.new_zeros(1), end[:-1]))
    total = end[-1]
    bounds = torch.arange(1, n_parts, device=end.device) * total // n_parts
    after = torch.searchsorted(end, bounds).clamp(max=len(end) - 1)
    nearest = torch.where(end[after] - bounds < bounds - begin[after], end[after], begin[after])
    bounds = torch.where((nearest - bounds).abs() <= SNAP * total / n_parts, nearest, bounds)
    first = torch.searchsorted(bounds, begin, right=True)
    last = torch.searchsorted(bounds, end).maximum(first)
    return bounds, begin, first, last


def _find_thresholds(
    keys: Tensor, node: Tensor, weight: Tensor, target: Tensor, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Find, for every node and column, the key below which the work is nearest to a target (radix selection).

    Args:
        keys: ``[n, K]`` int64 >= 0.
        node: ``[n]`` node of each atom.
        weight: ``[n]`` its work.
        target: ``[nodes]`` work wanted below the threshold.
        ranks: who holds the other atoms; ``nodes * K * 512`` numbers are summed over them per round.

    Returns:
        Thresholds and the work below them, both ``[nodes, K]``.
    """
    n_keys, radix = keys.shape[1], 2**DIGIT_BITS
    shape = (len(target), n_keys)
    slot = node[:, None] * n_keys + torch.arange(n_keys, device=keys.device)  # [n, K]
    prefix = target.new_zeros(shape)
    below = target.new_zeros(shape)
    wanted = target[:, None, None]
    for shift in range(63 - DIGIT_BITS, -1, -DIGIT_BITS):
        digits = keys >> shift
        inside = digits >> DIGIT_BITS == prefix.view(-1)[slot]
        bins = slot * radix + (digits & (radix - 1))
        histogram = target.new_zeros(shape[0] * n_keys * radix)
        histogram.index_add_(0, bins.view(-1), (inside * weight[:, None]).view(-1))
        upto = below[..., None] + ranks.sum(histogram).view(*shape, radix).cumsum(2)
        digit = (upto < wanted).sum(2, keepdim=True).clamp(max=radix - 1)
        before = upto.gather(2, (digit - 1).clamp(min=0))
        below = torch.where(digit > 0, before, below[..., None])[..., 0]
        prefix = (prefix << DIGIT_BITS) + digit[..., 0]
    # The atom on the boundary goes where it leaves the smaller error.
    including = upto.gather(2, digit)[..., 0]
    take = including - target[:, None] < target[:, None] - below
    return prefix + take, torch.where(take, including, below)


def _near_planes(
    u: Tensor, threshold: Tensor, node: Tensor, whole: Tensor, system: Tensor, sites: Sites, reach: float
) -> Tensor:
    """Return ``[n, 3]`` bool: would a cut along the axis put the atom within reach of a new face?

    Cutting a periodic axis for the first time makes two faces: the cut, and the seam of the box.
    """
    plane = (threshold >> 2 * TIE_BITS).to(u.dtype) / 2.0**AXIS_BITS
    height = sites.box.height[system][node]
    faces = (torch.minimum(u, 1 - u) * height + sites.box.seam[system][node] < reach) & whole[node]
    return ((u - plane[node]).abs() * height < reach) | faces
