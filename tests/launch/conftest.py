"""A Slurm of shell scripts: it says what a test wants, takes jobs and runs none."""

import stat
from pathlib import Path

import ase.io
import pytest

from tests.training.conftest import crystals

SINFO = """debug*|up|4|(null)|1:00:00
gpu|up|2|gpu:h100:8(S:0-1)|2-00:00:00
gpu|up|1|gpu:a100:4|2-00:00:00
old|down|9|(null)|infinite
"""


class Commands:
    """The scripts' folder; ``calls`` is what was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._calls = folder / "calls"

    def says(self, name: str, answer: str, code: int = 0) -> None:
        """Let a command answer on standard output, or with a code on standard error."""
        (self.folder / f"{name}.answer").write_text(answer)
        script = self.folder / name
        asked = f'echo {name} "$@" >> {self._calls}'
        script.write_text(f"#!/bin/sh\n{asked}\n/bin/cat {script}.answer >&{2 if code else 1}\nexit {code}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)

    @property
    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines() if self._calls.exists() else []

    @property
    def submitted(self) -> list[str]:
        """The batch scripts."""
        return [Path(c.split()[1]).read_text() for c in self.calls if c.startswith("sbatch")]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Slurm's commands are all that is in PATH; the working directory has data and is empty otherwise."""
    folder, here = tmp_path / "bin", tmp_path / "here"
    folder.mkdir()
    here.mkdir()
    made = Commands(folder)
    made.says("sinfo", SINFO)
    made.says("sacctmgr", "", code=1)
    made.says("sbatch", "Submitted batch job 17")
    made.says("srun", "")
    made.says("scontrol", "", code=1)
    made.says("sacct", "", code=1)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.chdir(here)
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return made


@pytest.fixture
def data(commands: Commands) -> list[str]:
    """Arguments of a small training, with its file in the working directory."""
    ase.io.write("frames.xyz", crystals("Cu", 5))
    return [
        "experiment=debug",
        "data=extxyz",
        "data.train=frames.xyz",
        "launch=slurm",
        "launch.time=00:30:00",
    ]
