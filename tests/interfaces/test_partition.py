import re
from pathlib import Path

import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import write
from matplotlib.image import imread

from gnnmd.cli import main
from gnnmd.graph import AtomBatch
from gnnmd.parallel.accounting import INFINIBAND, NVLINK, efficiency, partition_virtually, strategies


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["partition", *arguments]) == 0
    return capsys.readouterr().out


def row(text: str, *start: str) -> list[str]:
    """The cells of the line that starts with these cells."""
    (line,) = re.findall(rf"^ *{'  +'.join(map(re.escape, start))}  .*$", text, re.MULTILINE)
    return re.split(r" {2,}", line.strip())[len(start) :]


def test_the_tables_hold_what_was_counted(capsys):
    atoms = bulk("Ag", cubic=True) * (2, 2, 9)
    atoms.pbc = False  # the ranks at the ends have fewer partners and ghosts
    atoms.rattle(0.1, seed=1)
    write("ag.xyz", atoms)
    text = shown(capsys, "ag.xyz", "--ranks", "3,4", "--cutoff", "4.5")
    for n_parts in (3, 4):
        divided = partition_virtually(AtomBatch.from_ase(atoms), 4.5, n_parts)
        owned, rows = divided.owned, divided.all_to_all()
        assert row(text, str(n_parts), "planes") == [
            f"{owned.min()}",
            f"{144 / n_parts:.1f}",
            f"{owned.max()}",
            f"{rows.received.max()}",
            f"{divided.edges.max():,}",
            f"{divided.imbalance:.3f}",
            f"{rows.partners.max()}",
        ]
        for strategy in strategies(divided):
            found = row(text, str(n_parts), strategy.name)
            assert found[0] == f"{strategy.legs[0].rows.received.max():,}"
            if strategy.name != "wide halo":
                assert found[1:3] == [f"{strategy.legs[i].received.max() / 1e6:,.2f}" for i in (1, -2)]
            assert found[3] == f"{strategy.received.max() / 1e6:,.2f}"
            assert found[4] == f"{strategy.received.sum() / 1e6:,.0f}"
            assert found[5] == f"{strategy.edges.sum() / divided.edges.sum():.2f}"
            assert found[6:] == [
                f"{100 * efficiency(divided, strategy, link):.1f} %" for link in (NVLINK, INFINIBAND)
            ]
    assert not list(Path().glob("*.png"))


def test_one_number_of_ranks_shows_the_pairs_and_a_picture(capsys):
    """A rod of four pieces: each exchanges the same rows with its two neighbours."""
    text = shown(capsys, "Ag", "--repeat", "2,2,16", "--ranks", "4", "--cutoff", "3.5")
    layer = 8  # atoms of one plane, the only one within reach
    assert row(text, "0") == [".", f"{layer}", ".", f"{layer}"]
    assert row(text, "2") == [".", f"{layer}", ".", f"{layer}"]
    assert "picture: partition.png" in text
    picture = imread("partition.png")
    assert picture.shape[0] > 500
    assert picture[..., :3].std(axis=2).max() > 0.2  # colours


@pytest.mark.parametrize("ranks", ["1", "80"])
def test_a_picture_of_one_rank_and_of_more_ranks_than_atoms(capsys, ranks):
    text = shown(capsys, "Ag", "--repeat", "2,2,2", "--ranks", ranks, "--picture", "new/p.png")
    assert ("80 (48 empty)" in text) == (ranks == "80")
    assert Path("new/p.png").stat().st_size > 10_000


def test_a_lone_atom_leaves_the_other_ranks_empty(capsys):
    write("atom.xyz", Atoms("Ag"))
    text = shown(capsys, "atom.xyz", "--ranks", "3")
    assert row(text, "3 (2 empty)", "planes")[2:5] == ["1", "0", "0"]
    assert Path("partition.png").exists()


def test_a_checkpoint_gives_cutoff_layers_and_bytes_but_not_the_time(capsys):
    text = shown(capsys, "Ag", "--model", "silver", "--ranks", "2,3")
    assert "within 6 A" in text
    assert "silver: layers 1, exchanges 1, each 256 bytes per ghost" in text  # 4 rows of 16 float32
    assert "254 ns per edge (as UMA-S on one H200)" in text
    text = shown(capsys, "Ag", "--model", "silver", "--edge-time", "1000", "--ranks", "2,3")
    assert "one rank: 13.8 ms per step, 1000 ns per edge\n" in text  # 256 atoms with 54 neighbours


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Ag", "--ranks", "0"], "'0' must be whole numbers of at least 1"),
        (["Ag", "--ranks", "two"], "'two' must be whole numbers"),
        (["Ag", "--cutoff", "0"], "'0' must be a positive number"),
        (["Ag", "--cutoff", "nan"], "'nan' must be a positive number"),
        (["Ag", "--repeat", "4,4"], "'4,4' must be three numbers"),
        (["Ag", "--partition", "metis"], "invalid choice: 'metis'"),
        (["Ag", "--model", "silver", "--cutoff", "5"], "not allowed with argument"),
        (["Ag", "--ranks", "2,4", "--picture", "p.png"], "give one number of --ranks"),
    ],
)
def test_wrong_usage_is_refused_with_the_reason(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_info:
        main(["partition", *arguments])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_structures_that_cannot_be_divided_end_in_one_line(capsys):
    Path("notes.txt").write_text("no atoms")
    write("empty.xyz", Atoms())
    for name, message in [
        ("missing.xyz", "neither a file"),
        ("notes.txt", "cannot read a structure from notes.txt"),
        ("empty.xyz", "empty.xyz holds no atoms"),
    ]:
        assert main(["partition", name]) == 1
        shown = capsys.readouterr().err.strip()
        assert message in shown
        assert "\n" not in shown
