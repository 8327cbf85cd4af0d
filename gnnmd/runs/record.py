"""The record of a run, ``run.json`` in its folder: what ran, where, on which code, and how it ended."""

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import gnnmd
from gnnmd.predict.checkpoint import write_atomically
from gnnmd.runs.process import is_gone, this_process

RECORD = "run.json"
#: In a copy of the code: the commit it is of.
_COPIED = "copied_from.json"
#: Packages whose versions change numbers.
PACKAGES = ("torch", "lightning", "numpy", "ase", "torch_geometric", "vesin", "nvalchemi-toolkit-ops")
#: Environment variables that change what a run does; a list of names, so that no secret can slip through.
VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS"),
    *("MKL_NUM_THREADS", "PYTHONHASHSEED", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "GLOO_SOCKET_IFNAME", "WANDB_MODE"),
    *("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST", "SLURM_NTASKS"),
)


class RunRecord:
    """Keeps ``run.json`` up to date while a run lasts; does nothing until `start` is called.

    As a context manager it writes how the run ended: "finished", "interrupted" (also by Ctrl-C) or "failed"
    with the error. A process that is killed leaves "running", which the next start of the run corrects. Each
    start adds to "sessions" and keeps what earlier ones said, so a resumed run tells all of its history.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._content: dict[str, Any] = {}
        self._state = "finished"

    def start(self, folder: Path, kind: str, facts: Mapping[str, Any]) -> None:
        """Write the first record of this session.

        Args:
            folder: of the run.
            kind: "train" or "md".
            facts: what the caller knows (name, seed, model, data, parallel, ...), free of secrets.

        Raises:
            OSError: the folder cannot be written to.
        """
        self._path = folder / RECORD
        sessions = _earlier_sessions(self._path)
        session = {"start": _now(), "end": None, "state": "running", "process": this_process()}
        sessions.append(session | surroundings())
        self._content = {"kind": kind, "state": "running", **facts, "results": {}, "sessions": sessions}
        self._write()

    def finish(self, state: str, **results: Any) -> None:
        """Keep results, and how the run ends when the context is left without an error."""
        self._state = state
        if self._path is not None:
            self._content["results"] |= results

    def __enter__(self) -> "RunRecord":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._path is None:
            return
        state = self._state
        if error is not None:
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self._content["sessions"][-1]["error"] = f"{type(error).__name__}: {error}"
        self._content["state"] = self._content["sessions"][-1]["state"] = state
        self._content["sessions"][-1]["end"] = _now()
        try:
            self._write()
        except OSError:
            if error is None:  # never hide what really happened behind a full disk
                raise

    def _write(self) -> None:
        assert self._path is not None
        write_atomically(self._path, json.dumps(self._content, indent=2, default=str).encode())


def surroundings() -> dict[str, Any]:
    """Return command, code, versions, machine and the environment variables of `VARIABLES` that are set."""
    devices = range(torch.cuda.device_count())
    return {
        "command": command(),
        "folder": os.getcwd(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "git": git_state(Path(gnnmd.__file__).parent),
        "versions": {"gnnmd": gnnmd.__version__, "python": platform.python_version(), **_versions()},
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in devices],
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def command() -> str:
    """Return what was typed to start this process, to be pasted in the same folder."""
    program, *arguments = sys.argv
    path = Path(program)
    start = [path.name]  # an installed script
    if path.name == "__main__.py":
        start = ["python", "-m", path.parent.name]
    elif path.suffix == ".py":
        start = ["python", program]
    return shlex.join([*start, *arguments])


def keep_git_state(code: Path, copy: Path) -> None:
    """Write what is known of the code's commit into a copy of it, which has no history of its own."""
    (copy / _COPIED).write_text(json.dumps(git_state(code)))


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return commit of the code in ``folder`` and whether tracked files differ from it; None without git.

    An installed package that happens to lie inside somebody else's repository is not tracked there: None.
    Copies say what was known where they were made.
    """
    if (folder / _COPIED).is_file():
        known: dict[str, Any] | None = json.loads((folder / _COPIED).read_text())
        return known

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            stdin=subprocess.DEVNULL,
        )
        return done.stdout.strip()

    try:
        if not git("ls-files", "__init__.py"):
            return None
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _earlier_sessions(path: Path) -> list[Any]:
    """Return the sessions before this one, with what is known of those that could not say how they ended."""
    try:
        sessions = json.loads(path.read_text())["sessions"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or damaged: the run matters more
        return []
    if not isinstance(sessions, list):
        return []
    for session in sessions:
        if isinstance(session, dict) and session.get("state") == "running":
            gone = is_gone(session.get("process"))
            session["state"] = {True: "killed", False: "running", None: "unknown end"}[gone]
    return sessions


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
