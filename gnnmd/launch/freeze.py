"""The code of a job: a copy of this package, so that an edit does not change what is queued already."""

import shutil
from pathlib import Path

import gnnmd
from gnnmd.config import config_dir
from gnnmd.runs.record import keep_git_state


def freeze(folder: Path) -> Path:
    """Copy the package and its presets into a folder; return what goes first in PYTHONPATH.

    The copy is found before an installed or editable gnnmd, from any working directory under ``python -P``.
    Other packages are not copied: a job runs in the environment of its submission.
    """
    code = folder / "code"
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(Path(gnnmd.__file__).parent, code / "gnnmd", ignore=ignored)
    shutil.copytree(config_dir(), code / "gnnmd" / "configs", ignore=ignored, dirs_exist_ok=True)
    keep_git_state(Path(gnnmd.__file__).parent, code / "gnnmd")
    return code
