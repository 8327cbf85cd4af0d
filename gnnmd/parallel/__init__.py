"""Graph parallelism: who owns which atom, and how the rows of the others are fetched."""

from gnnmd.parallel.context import AllGatherContext, GPContext
from gnnmd.parallel.plan import Plan, build_plan, share_of
from gnnmd.parallel.ranks import RankFailure, Ranks

__all__ = ["AllGatherContext", "GPContext", "Plan", "RankFailure", "Ranks", "build_plan", "share_of"]
