"""How runs are stopped on purpose, and compared with those that were not."""

import os
import signal

import numpy as np
from lightning.pytorch import Callback

from tests.training.conftest import columns

CURVES = ("epoch", "step", "lr", "train_", "val_", "grad_norm")  # what no clock or memory enters


class AtStep(Callback):
    """Does something once, after a number of steps."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            self.action(trainer)


def ask_to_stop(trainer):
    trainer.should_stop = True


def interrupt(trainer):
    raise KeyboardInterrupt


def press_ctrl_c(trainer):
    os.kill(os.getpid(), signal.SIGINT)


def end_the_job(trainer):
    os.kill(os.getpid(), signal.SIGTERM)


def warn_of_the_end(trainer):
    os.kill(os.getpid(), signal.SIGUSR1)


def assert_same_curves(folder, expected):
    np.testing.assert_allclose(
        columns(folder, *CURVES).astype(float), columns(expected, *CURVES).astype(float), rtol=1e-8
    )
