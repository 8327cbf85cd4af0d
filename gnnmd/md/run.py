"""A run of molecular dynamics from its configuration, and the command ``gnnmd md``."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from gnnmd.data.structures import read_structure
from gnnmd.md import shards
from gnnmd.md.guards import Limits
from gnnmd.md.reporters import Average, Reporter, Thermo, Trajectory, ZarrTrajectory
from gnnmd.md.settings import MDConfig
from gnnmd.md.simulation import Simulation
from gnnmd.parallel import World
from gnnmd.predict import InferenceSettings, PredictUnit
from gnnmd.predict.checkpoint import write_atomically
from gnnmd.runs.record import RunRecord
from gnnmd.units import MEV

#: In a folder of restarts: the configuration of their run. JSON is YAML too.
CONFIG = "config.yaml"
#: What it leaves out: where a run takes place.
_PLACE = ("launch", "device", "workers", "resume", "restart")
#: What may change when a run goes on; the model is compared by its weights.
_MAY_CHANGE = (
    *("model", "steps", "edge_chunk", "skin", "max_temperature", "restart_interval", "keep"),
    *("log", "log_interval", "trajectory", "trajectory_interval"),
)


@dataclass(frozen=True)
class MDResult:
    """What a run gives.

    Attributes:
        simulation: at its last step.
        averages: of the whole run, equilibration included.
        code: 0 if it came to its end; 130 after Ctrl-C, 128 + the number of another signal. A restart holds
            the state then.
    """

    simulation: Simulation
    averages: Average
    code: int

    @property
    def finished(self) -> bool:
        """Whether it came to its end."""
        return self.code == 0


def run_md(config: MDConfig, *, unit: PredictUnit | None = None, live: bool = False) -> MDResult:
    """Run molecular dynamics to the last step, or to a signal.

    Args:
        config: the run.
        unit: used in place of ``config.model``.
        live: print a line every ``config.log_interval`` steps.

    Raises:
        FileNotFoundError: no such structure, checkpoint or restart.
        FileExistsError: the folder of restarts holds some of another run.
        ValueError: a structure that cannot be read, or values that do not fit together.
        SimulationError: the simulation has lost its meaning.
    """
    with RunRecord() as record:
        return _run_md(config, unit, live, record)


def _run_md(config: MDConfig, unit: PredictUnit | None, live: bool, record: RunRecord) -> MDResult:
    if config.restart is not None and not config.resume and shards.steps_in(Path(config.restart)):
        raise FileExistsError(
            f"{config.restart} holds the restarts of an earlier run: add resume=true to go on from them, or "
            "choose another restart= (and trajectory=, log=)"
        )
    if config.resume:
        check_resumable(config)
    averages = Average(interval=config.log_interval)
    reporters = [averages, Thermo(interval=config.log_interval, path=config.log, live=live), *_files(config)]
    if unit is None:
        settings = InferenceSettings(dtype=config.dtype, tf32=config.tf32, edge_chunk=config.edge_chunk)
        unit = PredictUnit.from_checkpoint(
            config.model, device=config.device, settings=settings, workers=_workers(config)
        )
    simulation = _resumed(config, unit, reporters) if config.resume else _new(config, unit, reporters)
    if config.restart is not None and unit.first:
        kept = {name: value for name, value in asdict(config).items() if name not in _PLACE}
        write_atomically(Path(config.restart) / CONFIG, json.dumps(kept, indent=2).encode())
        record.start(Path(config.restart).absolute().parent, "md", {"name": "md", "config": asdict(config)})
    code = 0
    try:
        simulation.run(max(config.steps - simulation.step, 0))
    except KeyboardInterrupt:
        code = 130
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    counters = asdict(simulation.counters)
    record.finish("interrupted" if code else "finished", step=simulation.step, counters=counters)
    return MDResult(simulation, averages, code)


def check_resumable(config: MDConfig) -> None:
    """Refuse to go on with a run that is another one by its meaning, as far as its folder tells.

    Raises:
        ValueError: names what differs.
    """
    file = Path(config.restart or "") / CONFIG
    if not file.is_file():  # written by a script of the user's
        return
    try:
        saved = {
            str(k): tuple(v) if isinstance(v, list) else v for k, v in json.loads(file.read_text()).items()
        }
    except (ValueError, AttributeError):
        raise ValueError(
            f"{file} is damaged: remove it, and give all that the run to resume was given"
        ) from None
    names = [f.name for f in fields(config) if f.name not in (*_PLACE, *_MAY_CHANGE)]
    changed = [f"{n}={saved[n]}" for n in names if n in saved and saved[n] != getattr(config, n)]
    if changed:
        raise ValueError(
            f"resume=true: the run in {config.restart} has {', '.join(changed)}, this configuration has not. "
            "Leave that out to go on with it, or start a new run from its last frame: resume=false "
            "structure=<its trajectory>, and restart=, trajectory=, log= of its own"
        )


def md(config: MDConfig) -> int:
    """Run molecular dynamics and report on the terminal; returns the exit code, see `MDResult`."""
    world = World.from_environment()
    first = world is None or world.rank == 0
    if first:
        print(_title(config))
    result = run_md(config, live=True)
    summary = _summary(config, result)  # collective
    if first:
        print(summary)
    return result.code


def _title(config: MDConfig) -> str:
    if config.resume:
        return f"going on from {config.restart} with {config.model} to step {config.steps}"
    return (
        f"{config.ensemble} of {config.structure} with {config.model}: {config.temperature:g} K, "
        f"{config.steps} steps of {config.timestep:g} fs"
    )


def _new(config: MDConfig, unit: PredictUnit, reporters: list[Reporter]) -> Simulation:
    atoms = read_structure(config.structure, config.repeat)
    if config.dataset is not None:
        atoms.info["dataset"] = config.dataset
    return Simulation(
        atoms,
        unit,
        config.integrator(),
        reporters=reporters,
        temperature=0.0 if config.ensemble == "minimize" else config.temperature,
        seed=config.seed,
        skin=config.skin,
        limits=_limits(config),
        restart=config.restart,
        restart_interval=config.restart_interval,
        keep=config.keep,
    )


def _resumed(config: MDConfig, unit: PredictUnit, reporters: list[Reporter]) -> Simulation:
    assert config.restart is not None
    return Simulation.resume(
        config.restart,
        unit,
        reporters=reporters,
        limits=_limits(config),
        skin=config.skin,
        restart_interval=config.restart_interval,
        keep=config.keep,
    )


def _limits(config: MDConfig) -> Limits | None:
    if config.ensemble == "minimize":
        return None
    hottest = max(10 * config.temperature, 5000.0)
    return Limits(temperature=hottest if config.max_temperature is None else config.max_temperature)


def _files(config: MDConfig) -> list[Reporter]:
    if config.trajectory is None:
        return []
    kind = ZarrTrajectory if config.trajectory.endswith(".zarr") else Trajectory
    return [kind(config.trajectory, interval=config.trajectory_interval)]


def _workers(config: MDConfig) -> int | None:
    """Return the number of workers: under torchrun or srun the processes that were started."""
    world = World.from_environment()
    if config.workers is None and world is not None and world.size > 1:
        return world.size
    return config.workers


def _summary(config: MDConfig, result: MDResult) -> str:
    simulation, now = result.simulation, result.simulation.scalars()
    did = simulation.counters
    lines = [
        f"step {simulation.step}, {now['time'] / 1000:g} ps; {did.rebuilds} rebuilds (skin {did.skin:g} A), "
        f"{did.readings} readings, {did.repeated} repeats"
    ]
    if result.averages.samples > 1:
        mean = result.averages.result()
        n = len(simulation.atoms)
        for name, unit, scale in (
            ("temperature", "K", 1.0),
            ("pressure", "GPa", 1.0),
            ("conserved", "meV/atom", MEV / n),
        ):
            value, spread = (float(x) * scale for x in (mean[name].value, mean[name].std))
            if math.isfinite(value):
                label = "conserved energy" if name == "conserved" else name
                lines.append(f"{label} {value:.4f} {unit}, standard deviation {spread:.4f}")
    files = [name for name in (config.log, config.trajectory, config.restart) if name and Path(name).exists()]
    if files:
        lines.append(f"wrote {', '.join(files)}")
    if not result.finished:
        again = "add resume=true to go on" if config.restart else "there is no restart: run it again"
        lines.append(f"interrupted at step {simulation.step} of {config.steps}; {again}")
    return "\n".join(lines)
