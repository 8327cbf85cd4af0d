from pathlib import Path

import pytest
from ase.build import bulk
from ase.io import write

from gnnmd.data.structures import read_structure


def test_structures_are_files_or_crystals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(read_structure("Ag")) == 256
    assert len(read_structure("Cu", (1, 1, 2))) == 8
    write("a.extxyz", [bulk("Ag"), bulk("Ag", cubic=True)])
    assert len(read_structure("a.extxyz")) == 4  # the last frame, once
    Path("b.extxyz").write_text("nonsense")
    with pytest.raises(ValueError, match="ASE cannot read a structure from b.extxyz"):
        read_structure("b.extxyz")
    with pytest.raises(FileNotFoundError, match="'silber' is neither a file .* nor a chemical symbol"):
        read_structure("silber")
