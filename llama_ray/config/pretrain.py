"""`kind: pretrain`: token shards → trained, checkpointed model."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from llama_ray.config.base import StrictModel
from llama_ray.config.job_base import NAME, JobConfig
from llama_ray.config.model import ModelConfig

# Table 1 of the paper, in percent.
PAPER_WEIGHTS = {
    "commoncrawl": 67.0,
    "c4": 15.0,
    "github": 4.5,
    "wikipedia": 4.5,
    "books": 4.5,
    "arxiv": 2.5,
    "stackexchange": 2.0,
}


def _named_weights(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value != "llama":
        raise ValueError("is no mixture; write `llama`, or a weight for each source")
    return PAPER_WEIGHTS


def _some_source(value: dict[str, float]) -> dict[str, float]:
    if not any(value.values()):
        raise ValueError("gives no source more than 0; give at least one more")
    return value


Amounts = Annotated[dict[str, Annotated[float, Field(ge=0)]], AfterValidator(_some_source)]
Weights = Annotated[Amounts, BeforeValidator(_named_weights)]


class StageConfig(StrictModel):
    """Takes `weights` or `epochs`."""

    from_step: int = Field(gt=0)
    """The first step of this mixture, in force until the next stage. (With `data.skip_steps`: the
    first batch, by its place in the token order.)"""
    weights: Weights | None = None
    """As `data.weights`."""
    epochs: Amounts | None = None
    """As `data.epochs`, in this stage."""

    @model_validator(mode="after")
    def _one_mixture(self) -> StageConfig:
        if (self.weights is None) == (self.epochs is None):
            raise ValueError("give either weights or epochs")
        return self


class DataConfig(StrictModel):
    tokens: str = Field(pattern=NAME)
    """Name of a `prepare` job: its shards are at `tokens/<name>` under `storage.url`."""
    seq_len: int = Field(2048, gt=1)
    """Tokens in a training sequence."""
    weights: Weights | None = None
    """Share of training tokens per source (they are normalised); sources left out are not read.
    `llama`: the paper's proportions (Table 1). Default: in proportion to each source's tokens."""
    epochs: Amounts | None = None
    """Instead of `weights`: how often each source is seen, relative to the others. The weights are
    epochs × tokens; how many epochs it is in the end follows from `train.steps`."""
    temperature: float = Field(1.0, gt=0)
    """Weights w become w^(1/T) (Arivazhagan et al. 2019): above 1, small sources are drawn more
    often. Applies to whatever the weights follow from, in every stage."""
    stages: list[StageConfig] = Field([])
    """Other mixtures for later steps, in order. Until the first of them `weights` or `epochs` hold.
    """
    on_corrupt: Literal["stop", "skip"] = "stop"
    """What to do where a shard is missing, too short, or not what was written. `skip`: train on
    another sample of the same source in the place of each that touches it, and count these."""
    mask_documents: bool = False
    """Tokens attend within their document only, not to others that were packed into their sequence
    (Zhao et al. 2024; Llama 3). Documents are told apart by their BOS and EOS."""
    skip_steps: list[tuple[int, int]] = Field([])
    """Batches to leave out, as `[[first, last], …]`, by their place in the token order, from 0 (a
    run that has left out none trains on batch n at step n): it goes on with the ones after."""
    window_steps: int = Field(16, gt=0)
    """Steps that one Ray Data read task fetches."""
    prefetch_windows: int = Field(16, gt=0)
    """Windows fetched at a time, while as many before them are trained on."""

    @field_validator("skip_steps")
    @classmethod
    def _forwards(cls, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
        for first, last in ranges:
            if not 0 <= first <= last:
                raise ValueError(f"[{first}, {last}] is no range; write [first, last], from 0")
        return ranges

    @model_validator(mode="after")
    def _one_mixture_at_a_time(self) -> DataConfig:
        if self.weights is not None and self.epochs is not None:
            raise ValueError("epochs takes the place of weights; leave one of them out")
        for before, after in pairwise(stage.from_step for stage in self.stages):
            if before >= after:
                raise ValueError(
                    f"stages: the one from step {after:,} stands after that from step "
                    f"{before:,}; order them by from_step"
                )
        return self


class OptimizerConfig(StrictModel):
    """AdamW, cosine to `final_lr_fraction`, as in section 2.3 of the paper."""

    lr: float = Field(3e-4, gt=0)
    """Peak learning rate: 3e-4 for 7B and 13B, 1.5e-4 for 33B and 65B (Table 2)."""
    warmup_steps: int = Field(2000, ge=0)
    """Steps of linear warm-up."""
    final_lr_fraction: float = Field(0.1, ge=0, le=1)
    """The last step's learning rate over the peak."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the gradients' running mean."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the squared gradients' running mean."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the squared gradients' mean."""
    weight_decay: float = Field(0.1, ge=0)
    """Applied to matrices; not to norm weights."""
    clip_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this global L2 norm."""
    spike_factor: float = Field(10.0, gt=1)
    """A step whose gradient norm exceeds its running mean by this factor is skipped, as is one
    whose norm is not finite: neither weights nor moments change."""
    max_skipped: int = Field(10, gt=0)
    """This many skipped steps in a row end the run."""


class TrainConfig(StrictModel):
    steps: int = Field(gt=0)
    """Optimizer steps in all."""
    batch_size: int = Field(gt=0)
    """Sequences in an optimizer step, over all ranks (the paper: 4 M tokens)."""
    micro_batch_size: int = Field(gt=0)
    """Sequences in one forward and backward pass on one data-parallel rank."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Matrix products compute in this type; weights and optimizer state stay float32."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again rather than keeps in memory. `selective`: the
    attention core, norms and SwiGLU product (Korthikanti et al. 2022). `full`: whole blocks."""
    compile: bool | None = None
    """torch.compile what lies between a block's matrix products. Default: on a GPU."""
    log_every: int = Field(10, gt=0)
    """Steps between metrics."""
    validate_every: int = Field(500, gt=0)
    """Steps between validations; the last step always validates."""
    validation_sequences: int = Field(256, gt=0)
    """Held-out sequences per validation, the same ones each time."""


class ParallelConfig(StrictModel):
    """Ranks = tensor × data. A tensor-parallel group shares each layer, so it wants the fastest
    links: neighbouring ranks, one node."""

    tensor: int = Field(1, gt=0)
    """Ranks that share one copy of the model; must divide heads, KV heads, FFN and vocabulary."""
    data: int = Field(1, gt=0)
    """Ranks that each take a share of the batch and of the weights and optimizer state."""
    min_data: int | None = Field(None, gt=0)
    """Go on with as few data-parallel ranks as this while nodes are missing, and grow back to
    `data` when they return; whole tensor-parallel groups come and go. Default: `data`, not elastic.
    """
    resize_seconds: float = Field(60.0, gt=0)
    """How often an elastic run looks whether it can grow."""
    shard: int | None = Field(None, gt=0)
    """Data-parallel ranks that one copy of weights, gradients and optimizer state is spread over;
    must divide `data`. Default: `data`. Fewer: hybrid sharding, data / shard copies."""
    sequence: bool = True
    """Sequence parallelism within a tensor-parallel group: norms and residuals on a share of the
    tokens each. No effect where `tensor` is 1."""
    overlap: bool = True
    """Collectives run under the matrix products that they feed or follow."""
    reshard_after_forward: bool = True
    """Free a block's gathered weights after its forward pass and gather them again for its backward
    pass; false: keep them for the whole step, which takes memory and saves communication."""
    reduce_every_micro_batch: bool = False
    """Reduce gradients over data-parallel ranks after each micro-batch and keep a shard of them,
    rather than all of them until the last one: less memory, more communication."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """CPUs that Ray reserves per rank. (Reading tokens reserves none.)"""
    threads_per_worker: int | None = Field(None, gt=0)
    """Compute threads per rank on a CPU. Default: `cpus_per_worker`, rounded up."""

    @property
    def world_size(self) -> int:
        return self.tensor * self.data

    @property
    def shard_size(self) -> int:
        """Data-parallel ranks over which one copy of the weights is spread."""
        return self.shard or self.data


class CheckpointConfig(StrictModel):
    every: int = Field(1000, gt=0)
    """Steps between checkpoints; the last step is always checkpointed."""
    keep: int = Field(3, gt=0)
    """Newest committed checkpoints kept."""
    keep_every: int | None = Field(None, gt=0)
    """Kept besides, for good: those of steps that are multiples of this."""
    keep_best: int = Field(0, ge=0)
    """Kept besides: this many with the lowest validation loss (of those taken at a validation)."""
    resume: str = "auto"
    """`auto`: go on from the newest committed checkpoint of the run of this name, if any. `never`:
    refuse to start where there is one. Else what a run without checkpoints of its own starts from:
    `runs/<name>` (its newest) or one of its checkpoints, with its step and its optimizer, if any.
    """
    max_in_flight: int = Field(1, gt=0)
    """Checkpoints copied aside and not committed yet; each takes a rank's share of weights and
    optimizer state in host memory. Training waits before it makes one more."""
    deadline_seconds: float = Field(1800.0, gt=0)
    """An upload is tried again and again for this long; then the run fails."""


class FailuresConfig(StrictModel):
    """What happens when something breaks. Restarts resume from the newest committed checkpoint."""

    max_restarts: int = Field(10, ge=-1)
    """Restarts of the workers after failures; preemptions do not count. -1: without end."""
    hang_seconds: float = Field(300.0, gt=0)
    """For so long ranks wait in a collective; then the one that holds them up is named, and the
    workers are restarted. Longer than any step, and than reading its tokens may take."""
    grace_seconds: float = Field(60.0, gt=0)
    """After SIGTERM to the job's driver: time to save a checkpoint and leave."""


class PretrainConfig(JobConfig):
    kind: Literal["pretrain"] = "pretrain"
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    failures: FailuresConfig = FailuresConfig()

    @model_validator(mode="after")
    def _splits_evenly(self) -> PretrainConfig:
        parallel, data = self.parallel, self.data
        choices = self.model.tensor_parallel_choices()
        if parallel.tensor not in choices:
            raise ValueError(
                f"parallel.tensor: {parallel.tensor} does not divide the model's heads, KV "
                f"heads, FFN and vocabulary; choose from {', '.join(map(str, choices))}"
            )
        if parallel.data % parallel.shard_size:
            divisors = [n for n in range(1, parallel.data + 1) if parallel.data % n == 0]
            raise ValueError(
                f"parallel.shard: {parallel.shard} does not divide parallel.data {parallel.data}; "
                f"choose from {', '.join(map(str, divisors))}"
            )
        if parallel.sequence and data.seq_len % parallel.tensor:
            raise ValueError(
                f"parallel.sequence: data.seq_len {data.seq_len} does not split over "
                f"parallel.tensor {parallel.tensor} ranks; make it a multiple of "
                f"{parallel.tensor}, or set parallel.sequence=false"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> PretrainConfig:
        per_pass = self.train.micro_batch_size * self.parallel.data
        if self.train.batch_size % per_pass:
            raise ValueError(
                f"train.batch_size: {self.train.batch_size} is no multiple of "
                f"train.micro_batch_size × parallel.data = {per_pass}"
            )
        if self.data.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"data.seq_len: {self.data.seq_len} exceeds model.max_seq_len "
                f"{self.model.max_seq_len}"
            )
        if self.data.stages and self.data.stages[-1].from_step >= self.train.steps:
            raise ValueError(
                f"data.stages: the stage from step {self.data.stages[-1].from_step:,} never comes: "
                f"train.steps is {self.train.steps:,}"
            )
        if self.optimizer.warmup_steps >= self.train.steps:
            raise ValueError(
                f"optimizer.warmup_steps: {self.optimizer.warmup_steps} leaves no step of "
                f"train.steps {self.train.steps} to learn in"
            )
        return self

    @model_validator(mode="after")
    def _elastic(self) -> PretrainConfig:
        lowest, data = self.parallel.min_data, self.parallel.data
        if lowest is not None and lowest > data:
            raise ValueError(f"parallel.min_data: {lowest} is more than parallel.data {data}")
        return self

    def usable_data(self) -> list[int]:
        """The numbers of data-parallel ranks that this run can go on with, ascending."""
        per_rank = self.train.micro_batch_size
        return [
            n
            for n in range(self.parallel.min_data or self.parallel.data, self.parallel.data + 1)
            if self.train.batch_size % (n * per_rank) == 0 and n % (self.parallel.shard or n) == 0
        ]

    def with_data(self, data: int) -> PretrainConfig:
        """This run on another number of data-parallel ranks, one of `usable_data`."""
        parallel = self.parallel.model_copy(update={"data": data})
        return self.model_copy(update={"parallel": parallel})

    def with_start(self, folder: str | None) -> PretrainConfig:
        """This run, starting from this very checkpoint where it has none of its own."""
        resume = self.checkpoint.resume if folder is None else folder
        checkpoint = self.checkpoint.model_copy(update={"resume": resume})
        return self.model_copy(update={"checkpoint": checkpoint})

    @property
    def grad_accum_steps(self) -> int:
        """Forward and backward passes in one optimizer step."""
        return self.train.batch_size // (self.train.micro_batch_size * self.parallel.data)

    @property
    def tokens_per_step(self) -> int:
        return self.train.batch_size * self.data.seq_len
