"""gnnmd: message-passing interatomic potentials on one atomic system spread over many devices."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gnnmd.graph import AtomBatch
    from gnnmd.interfaces.ase import GNNMDCalculator
    from gnnmd.predict import InferenceSettings, PredictUnit

_PUBLIC = {
    "AtomBatch": "gnnmd.graph",
    "GNNMDCalculator": "gnnmd.interfaces.ase",
    "InferenceSettings": "gnnmd.predict",
    "PredictUnit": "gnnmd.predict",
}

__all__ = ["AtomBatch", "GNNMDCalculator", "InferenceSettings", "PredictUnit", "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``import gnnmd`` stays fast."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'gnnmd' has no attribute {name!r}")
