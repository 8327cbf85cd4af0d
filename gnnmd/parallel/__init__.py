"""Graph parallelism: who owns which atom, and how the rows of the others are fetched."""

from gnnmd.parallel.context import AllGatherContext, GPContext, TimedContext
from gnnmd.parallel.mesh import Mesh
from gnnmd.parallel.plan import Plan, build_plan, share_of
from gnnmd.parallel.ranks import RankFailure, Ranks
from gnnmd.parallel.workers import WorkerDied, Workers
from gnnmd.parallel.world import World

__all__ = [
    "AllGatherContext",
    "GPContext",
    "Mesh",
    "Plan",
    "RankFailure",
    "Ranks",
    "TimedContext",
    "WorkerDied",
    "Workers",
    "World",
    "build_plan",
    "share_of",
]
