import contextlib
import subprocess
import sys

import ase.io
import pytest

from gnnmd import __version__, cli
from tests.training.conftest import crystals


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_without_a_command_all_commands_are_listed(arguments, capsys):
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name}" in shown for name in cli.COMMANDS)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"gnnmd {__version__}"


def test_an_unknown_command_is_refused_with_the_nearest(capsys):
    assert cli.main(["tarin"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_exists_and_has_help(name, capsys):
    with contextlib.suppress(SystemExit):  # argparse exits
        assert cli.main([name, "--help"]) == 0
    assert name in capsys.readouterr().out


def test_too_little_memory_ends_in_one_line(monkeypatch, capsys):
    def command(arguments):
        raise MemoryError("a system of 10 atoms does not fit")

    monkeypatch.setattr(cli, "_command", lambda name: command)
    assert cli.main(["predict"]) == 1
    assert capsys.readouterr().err == "gnnmd predict: a system of 10 atoms does not fit\n"


def test_a_misspelt_key_ends_in_one_line_without_a_traceback(capsys):
    assert cli.main(["train", "trainer.max_epoch=3"]) == 1
    shown = capsys.readouterr().err.strip()
    assert shown == "gnnmd train: unknown key 'trainer.max_epoch', did you mean 'trainer.max_epochs'?"


def test_missing_data_end_in_one_line(capsys, tmp_path):
    arguments = ["train", "data=extxyz", f"data.train={tmp_path}/none.xyz", f"runs={tmp_path}"]
    assert cli.main(arguments) == 1
    assert "none.xyz" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_faults_of_ours_are_not_hidden(monkeypatch):
    monkeypatch.setattr(cli, "_command", lambda name: lambda arguments: {}["missing"])
    with pytest.raises(KeyError):
        cli.main(["info"])


def test_traceback_shows_an_error_in_full():
    with pytest.raises(ValueError, match="max_epoch"):
        cli.main(["train", "trainer.max_epoch=3", "--traceback"])


def test_ctrl_c_has_the_exit_code_shells_expect(monkeypatch, capsys):
    def pressed(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_command", lambda name: pressed)
    assert cli.main(["demo"]) == 130


def test_the_command_line_starts_without_importing_torch():
    code = "import sys, gnnmd.cli; gnnmd.cli.main([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_debug_run_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ase.io.write("copper.xyz", crystals("Cu", 5))
    assert (
        cli.main(["train", "experiment=debug", "data=extxyz", "data.train=copper.xyz", "trainer.device=cpu"])
        == 0
    )
    shown = capsys.readouterr().out
    assert "errors on the test set (1 frames)" in shown
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-debug")
    assert str(folder.relative_to(tmp_path) / "best.safetensors") in shown
