"""Signals and killed ranks, in programs of their own."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from gnnmd.md import Simulation, handles, shards, signals
from gnnmd.md.reporters import Callback, Frame
from gnnmd.parallel import RankFailure
from tests.md.jobs import Stop, unit_on
from tests.md.test_restart import start

PROGRAM = """
import os
import sys
from pathlib import Path
from gnnmd import PredictUnit
from gnnmd.md import Simulation
from gnnmd.models.emt import emt
from tests.md.jobs import EXACT, Alive
from tests.md.test_restart import HOT, crystal

folder, workers, device = Path(sys.argv[1]), int(sys.argv[2]) or None, sys.argv[3]
with PredictUnit(emt(), device=device, settings=EXACT, workers=workers) as unit:
    options = {"reporters": [Alive(folder)], "restart": folder / "r", "restart_interval": 20}
    try:
        Simulation(crystal(), unit, HOT, seed=3, **options).run(1_000_000)
    except SystemExit as end:
        (folder / f"code-{os.environ.get('RANK', 0)}").write_text(str(end.code))
        raise
"""
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TWO_GPUS = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
    ],
)
WAYS = {"alone": ([], 0), "workers": ([], 2), "torchrun": (TORCHRUN, 2)}


class Program:
    """A simulation that runs until it is stopped."""

    def __init__(self, folder: Path, way: str, device: str = "cpu") -> None:
        launcher, self.n = WAYS[way]
        self.folder = folder
        script = folder / "program.py"
        script.write_text(PROGRAM)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        with (folder / "stderr").open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, str(script), str(folder), str(self.n), device],
                env=environment,
                stderr=errors,
                start_new_session=True,
            )

    def __enter__(self) -> "Program":
        deadline = time.monotonic() + 120
        while not (self.step >= 25 and shards.steps_in(self.folder / "r")):
            assert time.monotonic() < deadline, self.errors()
            assert self.process.poll() is None, self.errors()
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        for pid in (self.process.pid, *self.ranks()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    @property
    def step(self) -> int:
        return self._number("step-0")

    def ranks(self) -> list[int]:
        return [self._number(f"pid-{rank}") for rank in range(max(self.n, 1))]

    def end(self, within: float) -> int:
        """Return the exit code of the program, whose ranks must have ended too."""
        code = self.process.wait(within)
        deadline = time.monotonic() + 5
        while any(_lives(pid) for pid in self.ranks()):
            assert time.monotonic() < deadline, "a rank is left hanging"
            time.sleep(0.05)
        return code

    def errors(self) -> str:
        return (self.folder / "stderr").read_text()

    def _number(self, name: str) -> int:
        with suppress(FileNotFoundError, ValueError):
            return int((self.folder / name).read_text())
        return 0


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("way", "number"),
    [("alone", signal.SIGUSR1), ("workers", signal.SIGTERM), ("torchrun", signal.SIGTERM)],
)
@pytest.mark.parametrize("device", ["cpu", TWO_GPUS])
def test_a_signal_ends_the_program_with_a_restart_and_a_code_that_tells(tmp_path, way, number, device):
    with Program(tmp_path, way, device) as program:
        program.process.send_signal(number)
        code = program.end(within=30)
    codes = [int(path.read_text()) for path in tmp_path.glob("code-*")]
    assert codes == [128 + number] * (2 if way == "torchrun" else 1)
    assert code == 128 + number or (way == "torchrun" and code != 0)  # it has a code of its own
    assert "terminate called" not in program.errors()
    step = shards.steps_in(tmp_path / "r")[-1]
    assert step >= program.step
    simulation = Simulation.resume(tmp_path / "r", unit_on(None))
    assert simulation.run(3).step == step + 3


@pytest.mark.parametrize("way", ["workers", "torchrun"])
@pytest.mark.parametrize("device", ["cpu", TWO_GPUS])
def test_a_killed_rank_ends_the_program_everywhere_and_a_restart_goes_on(tmp_path, way, device):
    with Program(tmp_path, way, device) as program:
        os.kill(program.ranks()[1], signal.SIGKILL)
        assert program.end(within=30) != 0
    if way == "workers":
        assert "WorkerDied: worker 1 of 2 died (signal 9)" in program.errors()
    step = shards.steps_in(tmp_path / "r")[-1]
    assert Simulation.resume(tmp_path / "r", unit_on(None)).run(3).step == step + 3


def stop_and_go_on(group, folder: str) -> tuple[list[int], np.ndarray]:
    steps = []
    simulation = start(group, reporters=[Stop(7, signal.SIGINT, rank=1)], restart=folder)
    with pytest.raises(KeyboardInterrupt):
        simulation.run(20)
    steps.append(simulation.step)
    steps.append(Simulation.resume(folder, unit_on(group)).step)
    steps.append(simulation.run(13).step)
    return steps, simulation.atoms.positions


def test_after_ctrl_c_of_one_rank_all_have_stopped_and_can_go_on(pool, tmp_path):
    whole = start(None).run(20).atoms.positions
    for steps, positions in pool.run(2, stop_and_go_on, str(tmp_path / "r")):
        assert steps == [7, 7, 20]
        np.testing.assert_allclose(positions, whole, rtol=0, atol=1e-11)


def test_a_signal_during_the_last_step_is_not_lost():
    simulation = start(None, reporters=[Stop(7)])
    with pytest.raises(SystemExit):
        simulation.run(6)
    assert simulation.step == 6


def test_one_press_of_ctrl_c_that_comes_twice_is_one(monkeypatch):
    """torchrun sends it on to processes that have it from the terminal."""
    with signals.listening():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.asked() == signal.SIGINT
        monkeypatch.setattr(signals, "_SAME_PRESS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with signals.listening():
        assert signals.asked() == 0
        with signals.listening():
            signals.note(signal.SIGTERM)
        assert signals.asked() == signal.SIGTERM  # the inner one forgets nothing


def test_a_run_on_another_thread_does_not_hear_of_earlier_signals():
    simulation = start(None, reporters=[Stop(7, signal.SIGINT)])
    with pytest.raises(KeyboardInterrupt):
        simulation.run(20)
    thread = threading.Thread(target=simulation.run, args=(5,))
    thread.start()
    thread.join()
    assert simulation.step == 12


def simulations_left(group) -> int:
    """Return how many simulations are held after the ranks have parted."""
    simulation = start(group)
    before = len(handles._loops)
    simulation._unit._together.leave()
    del simulation
    return len(handles._loops) - before


def test_nothing_holds_the_process_group_after_the_ranks_have_parted(pool):
    """A group that is still there when Python ends aborts the process, and its exit code is lost."""
    assert pool.run(2, simulations_left) == [-1, -1]


WAITING = """
import ctypes, os, signal, threading
from gnnmd.md import signals
signals.PATIENCE = 0.5
with signals.listening():
    os.kill(os.getpid(), signal.SIGTERM)  # that one is delivered
    assert signals.asked() == signal.SIGTERM
with signals.listening():
    os.kill(os.getpid(), signal.SIGUSR1)  # and that one
    assert signals.asked() == signal.SIGUSR1
    mutex = ctypes.create_string_buffer(64)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    # later, so that the signal finds the main thread waiting and not on its way there
    threading.Timer(0.5, print, ["waiting"], {"flush": True}).start()
    ctypes.CDLL(None).pthread_mutex_lock(mutex)  # for ever, as for a GPU
"""


def test_a_process_that_waits_for_ever_ends_after_sigterm():
    command = [sys.executable, "-c", WAITING]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout.readline() == "waiting\n"
        process.terminate()
        try:
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert "a rank has died" in errors


# --- a callback that raises
# ----------------------------------------------------------------------------------------


def failing_at_5(frame: Frame) -> None:
    if frame.step == 5:
        raise ZeroDivisionError("nothing to divide by")


def callback_that_raises(group) -> tuple[str, int]:
    simulation = start(group, reporters=[Callback(failing_at_5, interval=5)])
    with pytest.raises(RankFailure) as error:
        simulation.run(1000)
    return str(error.value), simulation.step


def test_what_a_callback_raises_on_the_first_rank_is_raised_on_all(pool):
    for message, step in pool.run(2, callback_that_raises, timeout=30):
        assert message.startswith("rank 0 of 2 failed while showing what reporters found: ZeroDivisionError")
        assert step < 1000


CALLBACK = """
import os
import sys
from pathlib import Path
from gnnmd import PredictUnit
from gnnmd.md import Simulation
from gnnmd.md.reporters import Callback
from gnnmd.models.emt import emt
from tests.md.test_restart import HOT, crystal
from tests.md.test_stops import failing_at_5

unit, reporters = PredictUnit(emt(), device="cpu", workers=2), [Callback(failing_at_5, interval=5)]
simulation = Simulation(crystal(), unit, HOT, reporters=reporters)
try:
    simulation.run(1_000_000)
except RuntimeError as error:
    (Path(sys.argv[1]) / os.environ["RANK"]).write_text(str(error))
    raise
"""


def test_what_a_callback_raises_ends_a_program_under_torchrun(tmp_path):
    (tmp_path / "program.py").write_text(CALLBACK)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *TORCHRUN, str(tmp_path / "program.py"), str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0
    for rank in "01":
        assert "showing what reporters found: ZeroDivisionError: nothing" in (tmp_path / rank).read_text()
