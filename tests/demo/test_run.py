from pathlib import Path

from gnnmd.cli import main
from gnnmd.demo.report import Check, write_page


def test_demo_with_the_shipped_potential_writes_its_report(tmp_path: Path):
    """A fiftieth of the dynamics: too short for its thresholds, long enough for every step of the demo."""
    code = main(["demo", "--model", "silver", "--scale", "0.02", "--out", str(tmp_path)])
    assert code in (0, 1)
    page = (tmp_path / "index.html").read_text()
    assert (tmp_path / "report.png").stat().st_size > 10_000
    for row in ("force error (MAE)", "energy error (MAE)"):
        assert 'class="ok">pass' in page.split(row)[1].split("</tr>")[0]


def test_page_tells_failure_from_success_and_escapes(tmp_path: Path):
    path = tmp_path / "index.html"
    checks = [Check("a < b", "1", "at most 2", True), Check("c", "3", "at most 2", False)]
    write_page(path, checks, {"model": "<script>"}, "report.png")
    page = path.read_text()
    assert "a &lt; b" in page
    assert "<script>" not in page
    assert page.count("pass</td>") == page.count("FAIL</td>") == 1
