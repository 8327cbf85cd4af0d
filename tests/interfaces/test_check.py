import json
import re
from pathlib import Path

import pytest
from ase.build import bulk, molecule
from ase.io import write

from gnnmd import cli
from gnnmd.interfaces import check as module
from gnnmd.interfaces.check import check
from tests import broken


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def potential(monkeypatch):
    """Let the model's name be that of a class of `tests.broken`."""
    monkeypatch.setattr(module, "load_checkpoint", lambda name: (getattr(broken, name)(), None))


def rattled(name: str = "crystal.xyz", **info) -> str:
    atoms = bulk("Ag", cubic=True).repeat(2)
    atoms.rattle(0.1, seed=0)
    atoms.info.update(info)
    write(name, atoms)
    return name


def test_the_shipped_potential_passes_on_processes_of_its_own(capfd) -> None:
    """The whole command, started workers included."""
    assert cli.main(["check", "silver", "Ag", "--repeat", "4", "2", "2", "--ranks", "1,2"]) == 0
    shown = capfd.readouterr()
    assert "silver on Ag: 64 atoms, periodic along abc" in shown.out
    assert re.search(r"\npass  2 ranks: plan: 32 owned, 32 ghosts", shown.out)
    assert re.search(r"\npass  forces = -dE/dx +\S+e-1\d  1.0e-07  eV/A ", shown.out)
    assert re.search(r"\nall 26 checks passed in \d+ s\n$", shown.out)
    assert "FAIL" not in shown.out
    assert not shown.err


def test_a_failed_check_has_its_line_an_exit_code_and_an_entry_in_the_file(potential, capsys) -> None:
    arguments = ["--ranks", "1", "--device", "cpu", "--json", "c.json"]
    assert check(["StressIsTwiceTooLarge", rattled(), *arguments]) == 1
    shown = capsys.readouterr().out
    (line,) = (line for line in shown.splitlines() if line.startswith("FAIL"))
    assert line.startswith("FAIL  stress = dE/dstrain / V")
    assert re.search(r"\n1 of 21 checks failed in \d+ s: stress = dE/dstrain / V\n$", shown)
    content = json.loads(Path("c.json").read_text())
    assert content["passed"] is False
    assert content["atoms"] == 32
    (failed,) = (f for f in content["findings"] if f["passed"] is False)
    assert failed["name"] == "stress = dE/dstrain / V"
    assert failed["found"] > 1e3 * failed["limit"]


def test_a_check_that_raises_says_why_and_the_others_go_on(potential, capsys) -> None:
    assert check(["SinglePrecisionRaises", rattled(), "--ranks", "1"]) == 1
    shown = capsys.readouterr().out
    assert "\nFAIL  float32: RuntimeError: no such kernel\n" in shown
    assert "\npass  1 rank: forces" in shown


def test_the_file_is_json_without_nan(potential) -> None:
    assert check(["StressIsNotANumber", rattled(), "--ranks", "1", "--json", "c.json"]) == 1
    findings = json.loads(Path("c.json").read_text(), parse_constant=pytest.fail)["findings"]
    assert {f["found"] for f in findings if f["passed"] is False} == {None}


def test_charge_of_the_structure_arrives(potential, capsys) -> None:
    """It scales the energy of the Lennard-Jones model, so the net force of one broken atom grows."""
    found = []
    for charge in (0, 10):
        assert check(["OneForceIsTooLarge", rattled(charge=charge), "--ranks", "1"]) == 1
        found.append(float(re.search(r"sum of forces +(\S+)", capsys.readouterr().out)[1]))
    assert found[1] == pytest.approx(2 * found[0], rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["silver", "water.xyz"], "not trained on H, O"),
        (["silver", "Cu"], "not trained on Cu"),
        (["silver", "none.xyz"], "'none.xyz' is neither a file"),
        (["gold", "Ag"], "no checkpoint 'gold'"),
        (["silver", "Ag", "--ranks", "0,2"], "ranks must be positive numbers, e.g. 1,2,4; got [0, 2]"),
        (["silver", "Ag", "--repeat", "0", "1", "1"], "three positive integers"),
        (["silver", "Ag", "--device", "cuda:99"], "'cuda:99' was asked for"),
    ],
)
def test_what_cannot_be_checked_ends_in_one_line(arguments, message, capsys) -> None:
    write("water.xyz", molecule("H2O"))
    assert cli.main(["check", *arguments]) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_ranks_that_are_no_numbers_are_wrong_usage(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        check(["silver", "Ag", "--ranks", "two"])
    assert "'two' must be numbers with commas between, like 1,2,4" in capsys.readouterr().err
