"""Starting runs: here, or as jobs of a cluster that are saved, queued again and resumed."""

from gnnmd.launch.submit import start

__all__ = ["start"]
