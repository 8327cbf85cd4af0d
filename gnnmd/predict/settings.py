"""How a potential is evaluated, as opposed to what it is."""

from dataclasses import dataclass

import torch

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class InferenceSettings:
    """Choices that change speed, memory and rounding, never the model.

    Attributes:
        dtype: arithmetic of the network, "float32" or "float64" (or the torch dtype). Positions, energy sums
            and everything returned are float64 either way.
        tf32: let float32 matrix products round their factors to 11 bits on GPUs that can; set during a call
            only, the process-wide switch is put back.
        compile: run the backbone through `torch.compile`; the first calls take minutes.
        kernels: which version of its operations a model uses that has several: "torch", "triton", or "auto",
            the fastest that is known to be so (see `gnnmd.kernels`).
        merge_experts: mix the weights of a mixture of experts once instead of at every call, for systems of
            one composition, charge, spin and data set as in a simulation; mixed again as soon as one of them
            changes. Takes the memory of one more model without experts; nothing where there are none.
        edge_chunk: edges that the network handles at a time, to save memory; None handles all at once.
        stress: compute the stress too.
        descriptors: return invariant node features too.
        max_atoms: most atoms in one call when a list is predicted; a larger system is one call.
        max_edges: likewise, most edges and atoms together; None measures what an edge takes and fits the
            memory that is free.
        neighbors: name of the neighbour-list backend.
    """

    dtype: str | torch.dtype = "float32"
    tf32: bool = False
    compile: bool = False
    kernels: str = "auto"
    merge_experts: bool = False
    edge_chunk: int | None = None
    stress: bool = True
    descriptors: bool = False
    max_atoms: int = 100_000
    max_edges: int | None = None
    neighbors: str = "auto"

    def __post_init__(self) -> None:
        """Check the values; ``dtype`` becomes its name."""
        name = str(self.dtype).removeprefix("torch.")
        if name not in _DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(_DTYPES)}; set one of these")
        object.__setattr__(self, "dtype", name)
        if self.tf32 and name != "float32":
            raise ValueError(f"tf32=True rounds float32 products, but dtype is {name}; drop one of the two")
        for limit in ("edge_chunk", "max_atoms", "max_edges"):
            value = getattr(self, limit)
            if value is not None and value < 1:
                raise ValueError(f"{limit} must be at least 1, got {value}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch knows it."""
        return _DTYPES[str(self.dtype)]
