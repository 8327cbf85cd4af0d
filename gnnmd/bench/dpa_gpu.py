"""Time DPA-3 with six layers on one device: energy, forces and stress of displaced silver, random weights.

``python -m gnnmd.bench.dpa_gpu`` prints one JSON line per size. ``ms_median`` is a call whose neighbour list
exists already, ``ms_with_list_median`` one that builds it on the device first, ``host_ms_median`` how long
the former keeps the host (near ``ms_median`` = the host, or a wait for the GPU inside the call, is in the
way), ``captured_ms_median`` the same as one CUDA graph. The crystals are those of deepmd-kit's timings, see
``peers/README.md``.

``--profile N`` adds a table of the kernels of N more calls per size, written to ``--profile-file``.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gnnmd.bench.records import describe, print_record, provenance, silver
from gnnmd.graph import AtomBatch, neighbor_list
from gnnmd.graph.geometry import edge_vectors
from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.dpa3_config import DPA3Config
from gnnmd.parallel import GPContext
from gnnmd.predict import InferenceSettings
from gnnmd.predict.capture import CapturedPotential
from gnnmd.predict.evaluation import frozen_copy, own_arithmetic

#: Rows of the tables of `--profile`.
ROWS = 40


def main() -> None:
    """Measure every size in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--atoms", type=int, nargs="+", default=[500, 2048, 4000, 10976], help="4 k^3")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--tf32", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--kernels", default="auto", help="torch or triton")
    parser.add_argument("--edge-chunk", type=int, default=None)
    parser.add_argument("--no-stress", action="store_true")
    parser.add_argument("--neighbors", default="auto", help="backend of the neighbour list")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="profile N calls per size")
    parser.add_argument("--profile-file", type=Path, default=Path("dpa_gpu_profile.txt"))
    options = parser.parse_args()
    if options.profile:
        options.profile_file.write_text("")
    for n_atoms in options.atoms:
        try:
            record = measure(n_atoms, options)
        except Exception as error:  # out of memory, or the compiler's: the other sizes still count
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            record = {"atoms": n_atoms, "compile": options.compile, "error": reason}
        print_record(record, provenance())


def measure(n_atoms: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the record of one size."""
    device = torch.device(options.device)
    settings = InferenceSettings(
        dtype=options.dtype,
        tf32=options.tf32,
        compile=options.compile,
        edge_chunk=options.edge_chunk,
        stress=not options.no_stress,
        kernels=options.kernels,
        neighbors=options.neighbors,
    )
    torch.manual_seed(0)
    config = DPA3Config(type_map=("Ag",), nlayers=options.layers)
    potential = frozen_copy(build_potential(PotentialConfig(config)), device, settings)
    batch = AtomBatch.from_ase(silver(n_atoms)).to(device)
    gp, x = GPContext.single(len(batch.numbers)), batch.positions

    def listed() -> Any:
        return neighbor_list(batch, potential.r_cut, backend=settings.neighbors)

    graph = potential.graph(batch, listed())

    def call() -> Any:
        return potential(x, graph, gp, stress=settings.stress)

    def call_with_list() -> Any:
        return potential(x, potential.graph(batch, listed()), gp, stress=settings.stress)

    record = {
        "impl": "gnnmd DPA-3",
        "atoms": len(x),
        "edges": graph.edge_index.shape[1],
        "angles": _count_angles(graph.with_positions(x, batch.cell), config.a_rcut),
        "layers": config.nlayers,
        **describe(potential, device),
        **{name: getattr(settings, name) for name in ("tf32", "compile", "edge_chunk", "stress")},
    }
    with own_arithmetic(device, settings.tf32):
        start = time.perf_counter()
        result = call()
        record["energy_per_atom"] = float(result.energy) / len(x)  # waits for the device
        record["first_call_s"] = time.perf_counter() - start
        times, host, peak = _times(call, device, options)
        record |= {
            "ms_median": statistics.median(times),
            "ms_min": min(times),
            "host_ms_median": statistics.median(host),
            "katom_step_per_s": len(x) / statistics.median(times),
            "peak_mib": peak,
        }
        captured = CapturedPotential(potential)
        times, _, peak = _times(lambda: captured(x, graph, gp, stress=settings.stress), device, options)
        if captured.n_captures:  # on a GPU
            record |= {
                "captured_ms_median": statistics.median(times),
                "captured_katom_step_per_s": len(x) / statistics.median(times),
                "captured_peak_mib": peak,
            }
        record["ms_with_list_median"] = statistics.median(_times(call_with_list, device, options)[0])
        record["list_ms_median"] = statistics.median(_times(listed, device, options)[0])
        if options.profile:
            with options.profile_file.open("a") as file:
                print(_profile(call, device, options.profile, f"{len(x)} atoms"), file=file)
    return record


def _count_angles(g: Any, r_cut: float) -> int:
    near = torch.linalg.vector_norm(edge_vectors(g), dim=1) < r_cut
    return int((torch.bincount(g.edge_index[1, near], minlength=len(g.numbers)) ** 2).sum())


def _times(
    call: Callable[[], object], device: torch.device, options: argparse.Namespace
) -> tuple[list[float], list[float], int | None]:
    """Return ms until the device had finished, ms until the call returned, and peak MiB of the device."""
    on_gpu = device.type == "cuda"

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize(device)

    times, host = [], []
    for i in range(options.warmup + options.calls):
        if i == options.warmup and on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        wait()
        start = time.perf_counter()
        call()
        returned = time.perf_counter()
        wait()
        if i >= options.warmup:
            times.append(1e3 * (time.perf_counter() - start))
            host.append(1e3 * (returned - start))
    return times, host, round(torch.cuda.max_memory_allocated(device) / 2**20) if on_gpu else None


def _profile(call: Callable[[], object], device: torch.device, n: int, title: str) -> str:
    """Return tables of kernels (on a GPU) and of host operations, largest first; times per call."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as trace:  # torch 2.11 warns without
        for _ in range(n):
            call()
        if on_gpu:
            torch.cuda.synchronize(device)
    events = trace.key_averages()
    kernels = [(e.key, e.count, e.self_device_time_total) for e in events if e.device_type == DeviceType.CUDA]
    operations = [(e.key, e.count, e.self_cpu_time_total) for e in events if e.device_type == DeviceType.CPU]
    tables = [("kernels and copies", kernels), ("host operations (the profiler slows them down)", operations)]
    lines = [title]
    for name, rows in tables:
        total, count = sum(time for *_, time in rows) / n / 1e3, sum(number for _, number, _ in rows) / n
        lines.append(f"{name}: {count:.0f} and {total:.3f} ms per call\n   ms/call    count   us each  name")
        for key, number, microseconds in sorted(rows, key=lambda row: -row[2])[:ROWS]:
            each = microseconds / number
            lines.append(f"{microseconds / n / 1e3:10.3f} {number / n:8.1f} {each:9.1f}  {key[:160]}")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
