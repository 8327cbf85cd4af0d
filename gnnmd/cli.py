"""The ``gnnmd`` command: one sub-command per job, each imported when it is called."""

import difflib
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from gnnmd import __version__

#: Sub-command -> function(arguments) -> exit code, and what it does.
COMMANDS = {
    "train": ("gnnmd.cli:train", "train a potential (on the built-in silver set unless told otherwise)"),
    "info": ("gnnmd.predict.commands:info", "print what a checkpoint says about itself"),
    "convert": (
        "gnnmd.predict.commands:convert",
        "turn a checkpoint of fairchem-core or deepmd-kit into one of gnnmd",
    ),
    "predict": ("gnnmd.predict.commands:predict", "energies, forces and stress of the frames in a file"),
    "evaluate": ("gnnmd.predict.commands:evaluate", "errors of a checkpoint on labelled frames"),
    "check": (
        "gnnmd.interfaces.check:check",
        "test a potential on your own system: physics, ranks, precision",
    ),
    "partition": (
        "gnnmd.interfaces.partition:partition",
        "what dividing a structure over ranks costs, before any rank exists",
    ),
    "md": ("gnnmd.cli:md", "run molecular dynamics"),
    "runs": ("gnnmd.runs.table:runs", "list the runs of a folder, or show in what runs differ"),
    "demo": ("gnnmd.demo.run:demo", "train on silver, run molecular dynamics, write a report"),
}

#: What users can cause and correct: shown in one line. Everything else is a fault of ours and shown in full.
USER_ERRORS = (
    ValueError,
    OSError,
    FloatingPointError,
    MemoryError,
)

TRAIN_HELP = """usage: gnnmd train [group=preset ...] [key=value ...] [config.yaml ...]

Train a potential. Without arguments: the default model on the built-in silver set.

  gnnmd train experiment=debug                              a few seconds, to see whether everything runs
  gnnmd train data=extxyz data.train=frames.xyz trainer.max_epochs=100
  gnnmd train resume=runs/2026-01-31_12-00-00-silver        continue exactly where it stopped (or resume=auto)
  gnnmd train init_from=best.safetensors optim=finetune data=extxyz data.train=mine.xyz
  gnnmd train runs/2026-01-31_12-00-00-silver/config.yaml   the same run again
  gnnmd train parallel.gp=4                                 4 GPUs share every structure (dp=4: split them)
  gnnmd train launch=slurm launch.nodes=4 launch.gpus_per_node=8 launch.partition=gpu parallel.gp=8
  gnnmd train -m optim.lr=1e-3,3e-3 seed=0,1                all four, one after the other (or launch=slurm)
  gnnmd train heads=direct name=pre                         cheap pre-training; then: init_from=runs/...-pre
"""

MD_HELP = """usage: gnnmd md [key=value ...]

Run molecular dynamics. Without arguments: 256 silver atoms at constant energy with the shipped potential.

  gnnmd md model=best.safetensors structure=start.xyz ensemble=nvt temperature=600 steps=20000
  gnnmd md structure=Ag repeat=[6,6,6] timestep=2 trajectory=run.extxyz
  gnnmd md structure=big.xyz workers=4 trajectory=run.zarr   shared by four GPUs (or: srun -n 4 gnnmd md ...)
  gnnmd md steps=40000 resume=true                         go on from restart=md.restart
  gnnmd md -m temperature=300,600 launch=slurm             two jobs of a cluster
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``gnnmd``; returns the exit code (0 done, 1 failed, 2 wrong usage, 130 interrupted)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        print(f"gnnmd {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f", did you mean {nearest[0]!r}?" if nearest else ""
        print(f"gnnmd: no command {name!r}{hint}\n\n{_usage()}", file=sys.stderr)
        return 2
    traceback = "--traceback" in rest
    try:
        return _command(name)([a for a in rest if a != "--traceback"])
    except KeyboardInterrupt:
        print(f"gnnmd {name}: interrupted", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        if traceback:
            raise
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        print(f"gnnmd {name}: {error}{notes}", file=sys.stderr)
        return 1


def train(arguments: Sequence[str]) -> int:
    """Train a potential."""
    if {"-h", "--help"} & set(arguments):
        from gnnmd.config import describe

        print(f"{TRAIN_HELP}\n{describe([a for a in arguments if a not in ('-h', '--help')])}")
        return 0
    from gnnmd.launch import start

    return start("train", arguments)


def md(arguments: Sequence[str]) -> int:
    """Run molecular dynamics."""
    if {"-h", "--help"} & set(arguments):
        from gnnmd.config import describe_keys
        from gnnmd.md.settings import MDConfig

        print(f"{MD_HELP}\n{describe_keys(MDConfig())}")
        return 0
    from gnnmd.launch import start

    return start("md", arguments)


def _command(name: str) -> Callable[[Sequence[str]], int]:
    module, _, function = COMMANDS[name][0].partition(":")
    found: Callable[[Sequence[str]], int] = getattr(import_module(module), function)
    return found


def _usage() -> str:
    commands = "\n".join(f"  {name:10}{text}" for name, (_, text) in COMMANDS.items())
    more = "gnnmd COMMAND --help says more; --traceback shows errors in full."
    return f"usage: gnnmd COMMAND ...\n\n{commands}\n\n{more}"
