"""``gnnmd runs``: list the runs of a folder, or show in what some runs differ."""

import argparse
import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from gnnmd.runs.process import is_gone

#: Written by runs: gnnmd.runs.record and gnnmd.training.folder (not imported: torch takes seconds).
RECORD, CONFIG, METRICS, ERRORS = "run.json", "config.yaml", "metrics.csv", "errors.json"
COLUMNS = (
    *("name", "state", "date", "epochs", "steps", "val meV/atom", "val meV/A", "test meV/atom", "test meV/A"),
    *("model", "data", "gp x dp", "atoms/s", "duration"),
)


def runs(arguments: Sequence[str]) -> int:
    """List or compare runs; returns the exit code.

    Raises:
        FileNotFoundError: a folder that does not exist.
    """
    parser = argparse.ArgumentParser("gnnmd runs", description="List the runs of a folder, or compare runs.")
    parser.add_argument("folders", nargs="*", default=["runs"], help="folder of runs, or two and more runs")
    parser.add_argument("--json", action="store_true", help="print everything that is known, as JSON")
    given = parser.parse_args(arguments)
    folders = [Path(f) for f in given.folders]
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no folder {folder}. Name the folder that holds your runs (runs=... in gnnmd train)"
            )
    if len(folders) == 1 and not _is_run(folders[0]):
        found = [read_run(f) for f in sorted(folders[0].iterdir()) if f.is_dir() and f.name[:1] != "."]
    else:
        found = [read_run(f) for f in folders]
    if given.json:
        print(json.dumps(found, indent=2, default=str))
    elif len(folders) > 1:
        _print(("", *(run["row"]["name"] for run in found)), differences(found))
    else:
        _print(COLUMNS, [[str(run["row"].get(name, "")) for name in COLUMNS] for run in found])
        if not found:
            print(f"no runs in {folders[0]}")
    return 0


def read_run(folder: Path) -> dict[str, Any]:
    """Return "folder", "record", "config", "results" and the "row" of the table; never fails.

    What cannot be read is left out; then the state is "damaged", or "foreign" where nothing is a run's.
    """
    damaged: list[str] = []
    record = _read(folder / RECORD, json.loads, damaged)
    config = _read(folder / CONFIG, yaml.safe_load, damaged)
    errors = _read(folder / ERRORS, json.loads, damaged)
    metrics = _metrics(folder / METRICS, damaged)
    state = record.get("state", "unknown" if config or metrics else "foreign")
    if state == "running":
        state = _running(folder, record)
    if damaged:
        state = f"damaged ({', '.join(damaged)})"
    results = {
        **_best(metrics),
        **{f"test {k}": v for k, v in errors.items() if errors.get("split") == "test"},
    }
    last = metrics[-1] if metrics else {}
    parallel = _section(config, "parallel")
    row = {
        "name": folder.name,
        "state": state,
        "date": _start(record)[:16].replace("T", " "),
        "epochs": last.get("epoch", ""),
        "steps": last.get("step", ""),
        "val meV/atom": _milli(results.get("val energy_mae")),
        "val meV/A": _milli(results.get("val forces_mae")),
        "test meV/atom": _milli(results.get("test energy_mae")),
        "test meV/A": _milli(results.get("test forces_mae")),
        "model": _section(config, "model").get("type", ""),
        "data": _short(_section(config, "data").get("train", "")),
        "gp x dp": f"{parallel['gp']} x {parallel['dp']}" if {"gp", "dp"} <= set(parallel) else "",
        "atoms/s": _rounded(last.get("atoms_per_s")),
        "duration": _duration(last.get("seconds")),
    }
    return {"folder": str(folder), "row": row, "results": results, "config": config, "record": record}


def differences(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return rows (key, value in each run): configuration that differs, then all results."""
    rows: list[list[str]] = []
    for part in ("config", "record", "results"):
        flat = [_flat(_comparable(run, part)) for run in found]
        for key in dict.fromkeys(key for values in flat for key in values):
            values = [str(f.get(key, "-")) for f in flat]
            if part == "results" or len(set(values)) > 1:
                rows.append([key, *values])
    return rows


def _comparable(run: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """Return what is worth comparing: of a record, state, code, versions and machine of the last session."""
    if part != "record":
        return dict(run[part])
    last = _session(run["record"], -1)
    kept = {k: last[k] for k in ("host", "git", "versions", "cuda", "gpus", "environment") if k in last}
    return {"state": run["row"]["state"], **kept}


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (RECORD, CONFIG))


def _read(path: Path, parse: Any, damaged: list[str]) -> dict[str, Any]:
    try:
        content = parse(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        damaged.append(path.name)
        return {}
    return content


def _metrics(path: Path, damaged: list[str]) -> list[dict[str, Any]]:
    try:
        with path.open(newline="") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error):
        rows = [{}]
    if any("epoch" not in row or None in row or None in row.values() for row in rows):
        damaged.append(path.name)
        return []
    return rows


def _best(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the validation errors of the epoch with the lowest validation loss, the one that is kept."""
    validated = [row for row in rows if _number(row.get("val_loss")) is not None]
    if not validated:
        return {}
    best = min(validated, key=lambda row: float(row["val_loss"]))
    numbers = {f"val {k.removeprefix('val_')}": _number(v) for k, v in best.items() if k.startswith("val_")}
    return {"best epoch": float(best["epoch"])} | {k: v for k, v in numbers.items() if v is not None}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = f"{value:.6g}" if isinstance(value, float) else value
    return flat


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _running(folder: Path, record: Mapping[str, Any]) -> str:
    """Return what is known of a run that has not told its end; of other machines, its last change."""
    gone = is_gone(_session(record, -1).get("process"))
    if gone is not None:
        return "killed" if gone else "running"
    try:
        last = max(entry.stat().st_mtime for entry in folder.iterdir())
    except (OSError, ValueError):
        return "running?"
    return f"running? last change {datetime.fromtimestamp(last):%Y-%m-%d %H:%M}"


def _session(record: Mapping[str, Any], i: int) -> Mapping[str, Any]:
    sessions = record.get("sessions")
    session = sessions[i] if isinstance(sessions, list) and sessions else {}
    return session if isinstance(session, dict) else {}


def _start(record: Mapping[str, Any]) -> str:
    start = _session(record, 0).get("start")
    try:
        return datetime.fromisoformat(start).isoformat() if isinstance(start, str) else ""
    except ValueError:
        return ""


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _milli(value: Any) -> str:
    number = _number(value)
    return "" if number is None else f"{1e3 * number:.3g}"


def _rounded(value: Any) -> str:
    number = _number(value)
    return "" if number is None else f"{number:.3g}"


def _short(value: Any) -> str:
    names = value if isinstance(value, list) else [value]
    return ", ".join(Path(str(name)).name for name in names)


def _duration(value: Any) -> str:
    number = _number(value)
    if number is None:
        return ""
    hours, rest = divmod(round(number), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def _print(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(str(cell).replace("[", r"\[") for cell in row))
    if sys.stdout.isatty():
        Console().print(table)
        return
    wide = Console(width=10_000, file=io.StringIO())  # grep and cut must find whole lines
    with wide.capture() as text:
        wide.print(table)
    print("\n".join(line.rstrip() for line in text.get().splitlines()))
