"""What a training run is told: the dataclass behind `gnnmd train` and its sections."""

from dataclasses import dataclass, field, replace
from typing import Literal

from gnnmd.data.datamodule import DataConfig
from gnnmd.models.build import ModelConfig
from gnnmd.models.escn_md import EscnMDConfig
from gnnmd.parallel.settings import LaunchConfig
from gnnmd.training.losses import LossConfig
from gnnmd.training.optim import OptimConfig
from gnnmd.units import seconds


@dataclass
class TrainerConfig:
    """How long, where and in which arithmetic.

    Attributes:
        max_epochs: passes over the training data; learning rate and loss weights are planned for this length.
        max_time: stop (and keep everything) after this time, "[days:]hours:minutes:seconds".
        early_stop: stop after this many validations without a lower validation loss.
        validate_every: epochs between validations.
        precision: "float32"; "bf16-mixed" runs the matrix products of the backbone in bfloat16; "float64"
            the whole model. Positions, energy sums and losses are float64 in all of them.
        accumulate: batches per step (and replica): their gradients are averaged, for large steps in little
            memory.
        edge_chunk: edges of a layer that are processed at a time, and again in the backward pass; null =
            all at once. The result is the same; a smaller number takes longer and bounds the memory.
        device: "auto" takes a GPU if there is one.
        deterministic: refuse GPU kernels whose sums depend on timing (CPU runs repeat to the last digit
            anyway).
        progress: live bar in terminals, else one line per epoch ("auto"); only lines; or nothing.
    """

    max_epochs: int = 60
    max_time: str | None = None
    early_stop: int | None = None
    validate_every: int = 1
    precision: Literal["float32", "bf16-mixed", "float64"] = "float32"
    accumulate: int = 1
    edge_chunk: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False
    progress: Literal["auto", "lines", "none"] = "auto"

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("max_epochs", "validate_every", "early_stop", "accumulate", "edge_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.max_time is not None:
            seconds(self.max_time)


@dataclass
class ParallelConfig:
    """Processes (one per GPU) of a run: gp x dp of them.

    Under torchrun or srun, and in a job, so many must have been started; without, the run starts them on this
    machine.

    Attributes:
        gp: ranks that share every structure (graph parallel): memory per rank falls, the result stays the
            same.
        dp: replicas that split the structures (data parallel). A step takes a batch of ``data.max_frames``
            from each. None is as many as there are processes for, without any of them one.
    """

    gp: int = 1
    dp: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("gp", "dp"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def processes(self) -> int:
        """Number of processes, of one replica if dp is open."""
        return self.gp * (self.dp or 1)

    def over(self, processes: int, started: str) -> "ParallelConfig":
        """Return the division of so many processes, with dp as a number.

        Args:
            processes: how many there are.
            started: says so in the message.

        Raises:
            ValueError: gp x dp is another number.
        """
        dp = max(1, processes // self.gp) if self.dp is None else self.dp
        if self.gp * dp != processes:
            divisors = ", ".join(str(n) for n in range(1, processes + 1) if processes % n == 0)
            raise ValueError(
                f"parallel.gp={self.gp} x parallel.dp={dp} needs {self.gp * dp} processes, but {started}. "
                f"Set gp to a divisor ({divisors}) and leave dp out, or start {self.gp * dp}"
            )
        return replace(self, dp=dp)


@dataclass
class LoggerConfig:
    """Where metrics go besides the run folder's metrics.csv.

    Attributes:
        kind: nothing else, Weights & Biases, or TensorBoard files in the run folder.
        project: W&B project.
        entity: W&B user or team; None is the account's default.
        offline: keep W&B's files in the run folder, to be sent later with ``wandb sync``; always so where no
            key is found (WANDB_API_KEY, ``wandb login``): nobody is asked for one.
    """

    kind: Literal["none", "wandb", "tensorboard"] = "none"
    project: str = "gnnmd"
    entity: str | None = None
    offline: bool = False


@dataclass
class FinetuneConfig:
    """What a run with ``init_from`` keeps of the model it starts from.

    Attributes:
        freeze_backbone: train the heads and the energy references only. Faster, and little data cannot spoil
            what the network knows; but nothing new can enter the backbone: no elements, no data sets.
        elements: for which elements the result may be used. "data": those of the training data; others are
            refused, tables of the DPA models lose them, references of eSCN-MD become 0. "all": those of the
            old model too, although only the new data was looked at: their references stay those of the old
            level of theory, and their energies are not checked by anything.
    """

    freeze_backbone: bool = False
    elements: Literal["data", "all"] = "data"


@dataclass
class TrainConfig:
    """A training run.

    Attributes:
        name: part of the run folder's name, and the name in W&B.
        seed: of the weights and of the order of the data.
        runs: folder that holds the run folders.
        heads: "conservative" (forces and stress are derivatives of the energy) or "direct" (heads of their
            own: cheaper, for pre-training).
        init_from: checkpoint (.safetensors or a run folder) whose weights to start from. The architecture
            is then the checkpoint's; heads it does not have start fresh, energy references are fitted to
            the new data.
        finetune: what such a run keeps.
        resume: run folder to continue exactly where it stopped, or "auto": the newest run of this name, if
            any.
    """

    name: str = "silver"
    seed: int = 0
    runs: str = "runs"
    heads: Literal["conservative", "direct"] = "conservative"
    init_from: str | None = None
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    resume: str | None = None
    model: ModelConfig = field(default_factory=EscnMDConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        """Check what concerns several sections."""
        if self.data.train is None:
            raise ValueError("data.train names no frames; add data.train=<file, pattern or list of files>")
        if self.resume is not None and self.init_from is not None:
            raise ValueError("resume continues a run and init_from starts one; give one of the two")
        if self.finetune.freeze_backbone and self.init_from is None and self.resume is None:
            raise ValueError(
                "finetune.freeze_backbone=true leaves random weights as they are: set init_from to the model "
                "to start from"
            )
