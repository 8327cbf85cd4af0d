from dataclasses import replace

import ase.io
import numpy as np
import pytest
import torch

from gnnmd.training.run import train
from gnnmd.training.settings import ParallelConfig
from tests.training.conftest import columns, crystals

GPUS = torch.cuda.device_count()

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")]


@pytest.mark.parametrize(("gp", "dp"), [(GPUS, 1), (1, GPUS)])
def test_training_on_gpus_is_that_of_one_cpu_process(config, gp, dp, tmp_path):
    ase.io.write(tmp_path / "train.xyz", crystals("Cu", 3 * GPUS))  # three whole batches
    config.data = replace(config.data, train=str(tmp_path / "train.xyz"), max_frames=GPUS)
    config.trainer = replace(config.trainer, precision="float64")
    expected = train(config)
    config.data = replace(config.data, max_frames=GPUS // dp)
    config.trainer = replace(config.trainer, device="cuda")
    found = train(replace(config, parallel=ParallelConfig(gp, dp)))
    assert found.errors.keys() == expected.errors.keys()
    for name, error in expected.errors.items():
        assert found.errors[name] == pytest.approx(error, rel=1e-8), name
    waits, whole = (
        columns(found.folder, f"{part}_seconds").astype(float).sum()
        for part in ("communication", "forward_backward")
    )
    assert (waits > 0) == (gp > 1)
    assert waits < whole
    curves = [columns(r.folder, "train_loss", "val_forces_mae") for r in (found, expected)]
    a, b = (np.array([[float(x) for x in row if x] for row in c]) for c in curves)
    np.testing.assert_allclose(a, b, rtol=1e-8)
