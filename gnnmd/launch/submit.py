"""``gnnmd train`` and ``gnnmd md``: run here, one after the other, or submit to Slurm."""

import io
import shlex
import shutil
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from gnnmd.config import sweep, to_yaml
from gnnmd.launch import slurm
from gnnmd.launch.commands import COMMANDS
from gnnmd.launch.freeze import freeze
from gnnmd.launch.job import AGAIN, ERROR, Job
from gnnmd.parallel import World
from gnnmd.parallel.rendezvous import PATIENCE
from gnnmd.parallel.settings import LaunchConfig
from gnnmd.predict.checkpoint import check_writable
from gnnmd.units import seconds

#: All processes have ended: the first error goes to the top of the log, where people look. A process that was
#: killed writes none, but srun names it before those that lost the connection to it.
_TEARDOWN = r"""
code=$?
killed=$(grep -m1 '^srun: error: .*task' "$log" | grep -v 'Exited with exit code')
if [ -n "$killed" ] || [ -s "$error" ]; then
    [ -z "$killed" ] || echo "FAILED: ${killed#srun: error: }" > "$log.new"
    cat "$error" "$log" >> "$log.new" 2> /dev/null
    cat "$log.new" > "$log"
    rm "$log.new"
fi
if [ -e "$again" ] && [[ $(scontrol show job "$number") == *JobState=RUNNING* ]]; then
    exec scontrol requeue "$number"
fi
exit $code
"""


def start(name: str, arguments: Sequence[str]) -> int:
    """Start a command, or with ``-m`` all runs of a sweep; returns the exit code.

    Everything is checked before the first run starts or is queued.

    Args:
        name: "train" or "md".
        arguments: as in `load_config`; ``-m`` or ``--multirun`` lets ``key=a,b,c`` list several values.

    Raises:
        ValueError: settings that do not fit together, or that the cluster cannot give.
        FileNotFoundError: something that a run needs is missing.
    """
    several = {"-m", "--multirun"} & set(arguments)
    plain = [a for a in arguments if a not in ("-m", "--multirun")]
    chosen = sweep(plain) if several else [plain]
    configs = [COMMANDS[name].load(arguments) for arguments in chosen]
    if {config.launch.kind for config in configs} == {"local"}:
        configs = [COMMANDS[name].spread(c) if c.launch.chosen else c for c in configs]
        if len(configs) == 1:
            return COMMANDS[name].run(configs[0], None)
        return _one_by_one(name, configs, [_difference(run, chosen) for run in chosen])
    if World.from_environment() is not None:
        raise ValueError(
            "launch=slurm, but torchrun or srun has started this process: submit from outside of them, or "
            "add launch=local to run in these processes"
        )
    # Runs that need the same machines are one job array.
    groups: list[list[Any]] = []
    for config in map(COMMANDS[name].spread, configs):
        slurm.check(config.launch)
        check_writable(
            Path(config.launch.folder), "free some space, or choose another place with launch.folder="
        )
        if groups and groups[-1][0].launch == config.launch:
            groups[-1].append(config)
        else:
            groups.append([config])
    for group in groups:
        print("\n".join(submit(name, group)))
    return 0


def submit(name: str, configs: Sequence[Any]) -> list[str]:
    """Submit runs that need the same machines, as one job or one array; return what to tell the user.

    Args:
        name: key of `COMMANDS`.
        configs: resolved configurations with equal ``launch`` sections.

    Raises:
        ValueError: Slurm refuses the job, or a folder cannot be written.
    """
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError

    command, launch = COMMANDS[name], configs[0].launch
    label = getattr(configs[0], "name", name)
    folder = _job_folder(Path(launch.folder), label)
    placed = [command.place(config) for config in configs]  # each in a run folder of its own
    code = freeze(folder)
    jobs = []
    for i, (config, run) in enumerate(placed):
        file = folder / f"config_{i}.yaml"
        file.write_text(to_yaml(config))
        jobs.append(Job(name, file, run.absolute(), folder, launch.requeues))
    python = launch.python or shlex.quote(sys.executable)
    executor = SlurmExecutor(folder, python=f"{python} -P")  # -P: not the gnnmd of the working directory
    executor.update_parameters(**_parameters(launch, label, folder, code))
    try:
        with redirect_stderr(io.StringIO()), executor.batch():  # submitit prints what it raises
            submitted = [executor.submit(job) for job in jobs]
    except FailedJobError as error:
        shutil.rmtree(folder)
        for empty in [folder.parent, *(p for _, run in placed for p in (run, run.parent))]:
            with suppress(OSError):  # others, and a run to resume, are not empty
                empty.rmdir()
        reason = " ".join(str(error).replace("sbatch: error:", "").split())
        raise ValueError(f"Slurm refuses the job: {reason}; see launch.* in gnnmd {name} --help") from None
    return _told(command.title(configs[0]), launch, folder, submitted, [run for _, run in placed])


def _one_by_one(name: str, configs: Sequence[Any], titles: Sequence[str]) -> int:
    """Run a sweep here; a run that fails is told and does not keep the others from running."""
    failed = []
    for i, (config, title) in enumerate(zip(configs, titles, strict=True), start=1):
        print(f"\nrun {i} of {len(configs)}: {title}", flush=True)
        try:
            code = COMMANDS[name].run(config, None)
        except Exception:
            traceback.print_exc()
            failed.append(title)
            continue
        if code:
            return code  # a signal stopped it
    for title in failed:
        print(f"failed: {title}", file=sys.stderr)
    return 1 if failed else 0


def _difference(run: Sequence[str], runs: Sequence[Sequence[str]]) -> str:
    """Return the arguments of a run that not all of a sweep have."""
    return " ".join(a for i, a in enumerate(run) if len({other[i] for other in runs}) > 1)


def _job_folder(parent: Path, label: str) -> Path:
    date, number = f"{datetime.now():%Y-%m-%d_%H-%M-%S}", 1
    folder = parent.absolute() / f"{date}-{label}"
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{date}_{number}-{label}")
    folder.mkdir(parents=True)
    return folder


def _parameters(launch: LaunchConfig, label: str, folder: Path, code: Path) -> dict[str, Any]:
    """Return what submitit makes the batch script of."""
    number = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    jobs = shlex.quote(str(folder))
    error, again = (f"{jobs}/{name.replace('%j', '${number}')}" for name in (ERROR, AGAIN))
    given = asdict(launch)
    options = dict(option.partition("=")[::2] for option in launch.sbatch)
    return {
        **{key: given[key] for key in ("partition", "account", "qos", "constraint", "mem", "cpus_per_task")},
        "job_name": label,
        "nodes": launch.nodes,
        "ntasks_per_node": launch.per_node,
        "gpus_per_node": launch.gpus_per_node or None,
        "time": -(-seconds(launch.time) // 60),
        "array_parallelism": launch.at_once,
        "stderr_to_stdout": True,
        "wckey": None,
        "additional_parameters": {
            "signal": f"USR1@{launch.warn}",
            "requeue": True,
            **{key.lstrip("-"): value or True for key, value in options.items()},
        },
        "srun_args": [
            "--kill-on-bad-exit=1",
            "--distribution=block",  # neighbouring ranks share graphs: on one host
            *(["--cpus-per-task", str(launch.cpus_per_task)] if launch.cpus_per_task else []),
            *launch.srun,
        ],
        "setup": [
            *launch.setup,
            f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
            "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}",
            f"export {PATIENCE}={launch.join_timeout}",
            f"number={number}",
            f"error={error} again={again} log={jobs}/${{number}}_0_log.out",
            'rm -f "$error" "$again"',
        ],
        "teardown": _TEARDOWN.strip().splitlines(),
    }


def _told(
    title: str, launch: LaunchConfig, folder: Path, jobs: Sequence[Any], runs: Sequence[Path]
) -> list[str]:
    number = jobs[0].job_id.split("_")[0]
    array = f", an array of {len(jobs)}" if len(jobs) > 1 else ""
    where = f"{launch.nodes} x {launch.per_node} processes, at most {launch.time}"
    lines = [f"job {number}{array}: {title} ({where})"]
    for job, run in zip(jobs, runs, strict=True):
        if array:
            lines.append(f"  {job.job_id}:")
        lines += [f"  run     {run}", f"  follow  tail -F {job.paths.stdout}"]
    rank = "" if launch.processes == 1 else "; other ranks write <job>_<rank>_log.out beside it"
    return [
        *lines,
        f"  state   squeue -j {number}",
        f"  cancel  scancel {number}",
        f"  code and configuration are frozen in {folder}{rank}",
    ]
