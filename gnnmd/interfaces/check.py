"""The command ``gnnmd check``."""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gnnmd import __version__
from gnnmd.data.structures import read_structure
from gnnmd.graph import AtomBatch
from gnnmd.predict.checkpoint import load_checkpoint, write_atomically
from gnnmd.predict.self_check import Finding, self_check
from gnnmd.predict.unit import without_labels

_VERDICT = {True: "pass", False: "FAIL", None: ""}


def check(argv: Sequence[str]) -> int:
    """Check a potential on your own system and machine.

    Forces and stress are compared with differences of energies, several ranks with one, float32 with float64,
    and the system with itself translated, rotated and permuted. Returns 1 if a check failed, else 0.
    """
    args = _parser().parse_args(argv)
    potential, _ = load_checkpoint(args.model)
    repeat = None if args.repeat is None else tuple(args.repeat)
    atoms = without_labels(read_structure(args.structure, repeat))
    if args.dataset is not None:
        atoms.info["dataset"] = args.dataset
    periodic = "".join("abc"[axis] for axis in range(3) if atoms.pbc[axis])
    print(f"{args.model} on {args.structure}: {len(atoms)} atoms, periodic along {periodic or 'nothing'}\n")
    began, findings = time.perf_counter(), list[Finding]()
    for finding in self_check(potential, AtomBatch.from_ase(atoms), device=args.device, ranks=args.ranks):
        if not findings:
            print(f"{'':4}  {'check':25} {'found':8}  {'limit':8}")
        print(_line(finding), flush=True)
        findings.append(finding)
    checks = [f for f in findings if f.passed is not None]
    failed = [f.name for f in checks if not f.passed]
    seconds = f"in {time.perf_counter() - began:.0f} s"
    if failed:
        print(f"\n{len(failed)} of {len(checks)} checks failed {seconds}: {', '.join(failed)}")
    else:
        print(f"\nall {len(checks)} checks passed {seconds}")
    if args.json:
        _write(args.json, args, len(atoms), findings)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("gnnmd check", description=check.__doc__)
    parser.add_argument("model", help='a .safetensors file, or the name of a shipped one ("silver")')
    parser.add_argument("structure", help="file that ASE reads (its last frame), or the symbol of an element")
    parser.add_argument(
        "--repeat",
        type=int,
        nargs=3,
        metavar="N",
        help="copies along each lattice vector (default: 4 4 4 for a symbol, 1 1 1 for a file)",
    )
    parser.add_argument(
        "--ranks",
        type=_numbers,
        metavar="N,...",
        help="numbers of ranks to compare with one (default: 1,2,4; on GPUs as many of them as there are)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--dataset", help="level of theory, for models that know several")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there too")
    return parser


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be numbers with commas between, like 1,2,4"
        ) from None


def _line(finding: Finding) -> str:
    verdict, name, remark = f"{_VERDICT[finding.passed]:4}", finding.name, finding.remark
    if finding.found is None:
        return f"{verdict}  {name}: {remark}"
    limit = "" if finding.limit is None else f"{finding.limit:.1e}"
    return f"{verdict}  {name:25} {finding.found:8.1e}  {limit:8} {finding.unit:9}  {remark}".rstrip()


def _write(path: Path, args: argparse.Namespace, n_atoms: int, findings: Sequence[Finding]) -> None:
    content = {
        "gnnmd": __version__,
        "model": args.model,
        "structure": args.structure,
        "atoms": n_atoms,
        "passed": all(f.passed is not False for f in findings),
        "findings": [{k: _finite(v) for k, v in asdict(f).items()} for f in findings],
    }
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def _finite(value: Any) -> Any:
    """Return what JSON can hold: it knows no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
