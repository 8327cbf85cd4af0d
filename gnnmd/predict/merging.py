"""Mixtures of experts merged for the systems of a call, again whenever the mixture changes."""

import torch

from gnnmd.graph import AtomBatch
from gnnmd.models.merge import has_experts, merged, mixture_of
from gnnmd.models.potential import Potential
from gnnmd.predict.batching import take_systems
from gnnmd.predict.evaluation import frozen_copy
from gnnmd.predict.settings import InferenceSettings


class MergedExperts:
    """Chooses what evaluates a batch: a potential, or a copy with its experts merged for the batch.

    The mixture follows from composition, charge, spin and data set. It is looked at at every call: where it
    is another one than the last time, the weights are merged again from the ones that were given, which stay
    as they are. A batch whose systems have different mixtures is evaluated with these.

    Args:
        potential: frozen, on its device.
        settings: with ``merge_experts`` off, the potential itself evaluates everything.

    Attributes:
        n_merges: how often weights were merged.
    """

    def __init__(self, potential: Potential, settings: InferenceSettings) -> None:
        self._potential, self._settings = potential, settings
        self._asked = settings.merge_experts and has_experts(potential)
        self._merged: Potential | None = None
        self.n_merges = 0

    def for_batch(self, batch: AtomBatch) -> Potential:
        """Return the potential that evaluates a batch, the same function as the one given.

        Args:
            batch: on the device of the potential.

        Raises:
            ValueError: systems that the model cannot describe.
        """
        mixture = mixture_of(self._potential, batch) if self._asked else None
        if mixture is None:
            return self._potential
        if self._merged is not None and self._merged.merged_for == mixture:
            return self._merged
        fresh = merged(self._potential, take_systems(batch, 0, 1))
        self.n_merges += 1
        if self._merged is None:
            self._merged = frozen_copy(fresh, batch.numbers.device, self._settings)
        else:  # in place: what torch.compile knows of it stays valid
            with torch.no_grad():
                self._merged.load_state_dict(fresh.state_dict())
            self._merged.config, self._merged.merged_for = fresh.config, fresh.merged_for
        return self._merged
