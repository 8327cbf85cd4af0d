"""Graph parallelism: who owns which atom, and how the rows of the others are fetched."""

from gnnmd.parallel.context import GPContext

__all__ = ["GPContext"]
