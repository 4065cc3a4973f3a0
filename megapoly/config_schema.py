"""The sections and keys of a run's config, with their defaults, and the numbers that follow from them."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Literal

import pydantic
from pydantic import Field, PositiveFloat, PositiveInt

from megapoly.errors import ConfigError
from megapoly.mesh import Mesh
from megapoly.ramp import Batches, build_batches

Share = typing.Annotated[float, Field(ge=0.0, le=1.0)]
Rate = typing.Annotated[float, Field(ge=0.0, lt=1.0)]
Count = typing.Annotated[int, Field(ge=0)]
Alpha = typing.Annotated[float, Field(ge=0.0, le=2.0)]


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class RopeScaling(_Section):
    """Rotary angles for sequences longer than those that a model was first trained on."""

    kind: Literal["linear", "llama3"] = Field(
        description="linear divides every frequency by the factor; llama3 those with few periods in original_positions"
    )
    factor: PositiveFloat
    original_positions: PositiveInt | None = Field(None, description="llama3: longest sequence of the first training")
    low_frequency_factor: PositiveFloat | None = Field(
        None, description="llama3: frequencies with fewer periods are divided; 1 where not given"
    )
    high_frequency_factor: PositiveFloat | None = Field(
        None, description="llama3: frequencies with more periods are left; 4 where not given"
    )

    @property
    def low(self) -> float:
        return self.low_frequency_factor or 1.0

    @property
    def high(self) -> float:
        return self.high_frequency_factor or 4.0


class Model(_Section):
    """A pre-norm decoder. The defaults are the PolyLM / GPT-2 family: learned positions, LayerNorm, tanh GELU, biases,
    tied embeddings.

    LLaMA: norm = "rms", position = "rope", activation = "swiglu", biases = false, and tied = false in most sizes;
    Qwen2 has qkv_biases = true beside it. BLOOM: position = "alibi", embedding_norm = true.
    """

    layers: PositiveInt
    hidden: PositiveInt
    heads: PositiveInt
    ffn: PositiveInt
    vocabulary: PositiveInt
    positions: PositiveInt = Field(description="the longest sequence; rows of the table of learned positions")
    key_value_heads: PositiveInt | None = Field(None, description="grouped queries; as many as heads where not given")
    norm: Literal["layer", "rms"] = "layer"
    norm_epsilon: PositiveFloat = 1e-5
    embedding_norm: bool = Field(False, description="a norm on the embeddings")
    position: Literal["learned", "rope", "alibi"] = Field(
        "learned", description="a table that is trained, rotary embedding, or biases linear in the distance"
    )
    rope_base: PositiveFloat | None = Field(
        None, description="rope: wavelengths go from 2 pi to nearly 2 pi x this; 10000 where not given"
    )
    rope_scaling: RopeScaling | None = None
    activation: Literal["gelu", "swiglu"] = Field("gelu", description="of the feed-forward; swiglu has a gate of ffn")
    biases: bool = Field(True, description="of the linear layers")
    qkv_biases: bool | None = Field(None, description="of queries, keys and values; as biases where not given")
    tied: bool = Field(True, description="the output layer has the weight of the embedding, not one of its own")
    init_std: PositiveFloat = 0.02
    fp32_residual: bool = Field(True, description="keep the residual stream in fp32 under a lower precision")
    fp32_softmax: bool = Field(True, description="softmax of the attention in fp32 under a lower precision")
    dropout: Rate = Field(0.0, description="of the embeddings and of what the blocks add to the residual stream")
    attention_dropout: Rate = Field(0.0, description="of attention probabilities; takes the slower attention")

    @property
    def groups(self) -> int:
        return self.key_value_heads or self.heads

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def wavelength_base(self) -> float:
        return self.rope_base or 10000.0

    @property
    def has_qkv_biases(self) -> bool:
        return self.biases if self.qkv_biases is None else self.qkv_biases

    @property
    def inner(self) -> int:
        """Outputs of the first layer of the feed-forward."""
        return 2 * self.ffn if self.activation == "swiglu" else self.ffn


class Layout(_Section):
    """How the ranks share the model and the batch."""

    dp: PositiveInt | None = Field(None, description="data-parallel ranks; where not given, all that pp x tp leaves")
    pp: PositiveInt = 1
    tp: PositiveInt = 1
    micro_batch: PositiveInt = Field(1, description="samples of one forward pass of one rank")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU for each rank where there are any")
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero-bubble", "zero-bubble-v"] = "1f1b"
    virtual_stages: PositiveInt | None = Field(
        None, description="stages of a rank under interleaved (2 where not given); zero-bubble-v has 2, the others 1"
    )
    stage_layers: tuple[Count, ...] | None = Field(
        None, description="layers of every stage, first to last; balanced by cost where not given"
    )
    sequence_parallel: bool = Field(True, description="where tp > 1: norms, dropout and residual on slices of a sample")
    shard_optimizer: bool = Field(
        True, description="each dp rank keeps and updates its share of the optimizer (ZeRO-1)"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="what the backward pass computes again and does not keep: selective is the attention between qkv"
        " and output and the activation of the feed-forward, full is whole layers",
    )
    recompute_every: PositiveInt = Field(1, description="under full: every so many layers, the first of each group")
    bucket_mb: PositiveFloat = Field(32.0, description="size of a gradient bucket, in MB")
    timeout_seconds: PositiveFloat = Field(600.0, description="a collective that takes longer ends the run")

    @property
    def stages_per_rank(self) -> int:
        if self.schedule == "interleaved":
            return self.virtual_stages or 2
        return 2 if self.schedule == "zero-bubble-v" else 1

    @property
    def stages(self) -> int:
        """Pipeline stages in all, virtual ones too."""
        return self.pp * self.stages_per_rank

    @property
    def sequence_shards(self) -> int:
        """Slices of the sequence that norms, dropout and the residual stream work on."""
        return self.tp if self.sequence_parallel else 1


class Source(_Section):
    """One indexed dataset: ``path`` + ``.bin``/``.idx`` and, where megapoly wrote it, ``.json``."""

    path: Path
    language: str
    max_epochs: PositiveFloat | None = Field(None, description="of this source, in place of data.max_epochs")


class Stage(_Section):
    """A part of the curriculum: so many tokens, or epochs, of a mixture, given in one of three forms."""

    name: str
    tokens: PositiveInt | None = None
    epochs: PositiveFloat | None = Field(
        None,
        description="in place of tokens: passes over all windows of the stage's sources, up to a whole global batch;"
        " without a mixture every source comes as often",
    )
    weights: dict[str, Share] | None = Field(None, min_length=1, description="share of the samples by source; sum 1")
    languages: dict[str, Share] | None = Field(
        None, min_length=1, description="share by language, or pattern of languages such as 'en-*' or '*'; sum 1"
    )
    non_english: Share | None = Field(
        None,
        description="share of text that is not English, of which pairs with English hold a half; what languages beside"
        " it do not fix is split between English and the others",
    )
    alpha: Alpha = Field(
        0.3,
        description="what shares a share, languages and then sources of one, is split by training tokens to this"
        " power: 1 in proportion, 0 equally; 0.3 is XLM-R's",
    )
    gradual: bool = Field(
        False, description="weights move evenly over the stage, from those of the stage before to these"
    )


class Kernels(_Section):
    """What computes some ops on a GPU. ``auto`` is Triton there, and PyTorch on a CPU, where the others are refused.

    The log of a run says what is used for every op.
    """

    attention: Literal["auto", "triton", "sdpa", "flash_attn"] = Field(
        "auto", description="sdpa is PyTorch's own, flash_attn the package, for bf16 and fp16"
    )
    norm: Literal["auto", "triton", "cuda", "apex"] = Field(
        "auto", description="cuda is csrc/cuda, apex the package's FusedLayerNorm and FusedRMSNorm"
    )
    optimizer: Literal["auto", "triton", "apex"] = Field("auto", description="apex is the package's FusedAdam")


class Data(_Section):
    tokenizer: Path
    sources: dict[str, Source] = Field(min_length=1)
    stages: list[Stage] = Field(min_length=1)
    max_epochs: PositiveFloat | None = Field(None, description="how often a run may read a source; no cap by default")
    over_epochs: Literal["refuse", "respread"] = Field(
        "refuse",
        description="a plan above a cap: refused, or the others of the same share take the place of the source",
    )
    separate_documents: bool = Field(False, description="no attention across documents; positions restart")
    loss: Literal["responses", "all"] = Field(
        "responses",
        description="what is learned of instructions: the responses alone, or all; text is learned whole. Validation"
        " counts the responses",
    )
    slow_seconds: PositiveFloat = Field(10.0, description="a step that waits longer for its data says for which file")
    timeout_seconds: PositiveFloat = Field(300.0, description="a step that waits longer for its data ends the run")


class Ramp(_Section):
    """Global batches grow by ``increment`` samples from ``start`` to train.global_batch, over ``tokens`` tokens."""

    start: PositiveInt
    increment: PositiveInt
    tokens: PositiveInt


class Train(_Section):
    directory: Path
    sequence: PositiveInt
    global_batch: PositiveInt = Field(description="samples of one optimizer step, over all ranks")
    seed: Count = 1234
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = Field(
        "fp32", description="bf16 and fp16 keep fp32 master weights and gradients; fp16 scales the loss dynamically"
    )
    batch_ramp: Ramp | None = Field(None, description="smaller global batches at the beginning")


class Optimizer(_Section):
    """AdamW. Rates are functions of the trained tokens."""

    learning_rate: PositiveFloat
    minimum: Share = Field(0.1, description="the final rate, as a share of learning_rate")
    shape: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_tokens: Count = 0
    warmup_start: float = Field(0.0, ge=0.0, description="rate of the first step of the warm-up")
    decay_tokens: PositiveInt | None = Field(
        None, description="cosine: end of the decay (default: the run's); wsd: length of the final decay (a tenth)"
    )
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    beta2: float = Field(0.95, ge=0.0, lt=1.0)
    epsilon: PositiveFloat = 1e-8
    weight_decay: float = Field(0.1, ge=0.0)
    clip: PositiveFloat = Field(1.0, description="largest global gradient norm")


class Stability(_Section):
    """What is done about non-finite values and loss spikes."""

    nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="a loss or gradient that is not finite never reaches the weights: the run stops, or goes on"
    )
    most_skips: PositiveInt = Field(10, description="steps skipped in a row that end the run all the same")
    spike: PositiveFloat | None = Field(
        None,
        description="nats above the median of the last losses that make a step high; not given: no detector. A spike"
        " before the first checkpoint ends the run",
    )
    spike_window: PositiveInt = Field(100, description="steps of that median")
    spike_steps: PositiveInt = Field(3, description="high steps in a row that make a spike: the run rolls back")
    spike_skip_tokens: Count = Field(0, description="skipped after a spike, beside what led up to it")
    most_rollbacks: PositiveInt = Field(3, description="rollbacks that a run may make in all")


class Checkpoint(_Section):
    every_steps: PositiveInt = 500
    keep: PositiveInt = Field(2, description="whole checkpoints kept; older ones are removed")
    keep_every_steps: PositiveInt | None = Field(None, description="those of every so many steps are never removed")
    background: bool = Field(
        False,
        description="training waits only while what a rank saves is copied in its host memory, and a thread writes it;"
        " an error of the thread is raised at the next checkpoint or the end",
    )


class Validation(_Section):
    every_steps: PositiveInt | None = Field(None, description="beside before, between and after the stages")
    windows: Count = Field(16, description="windows of each source's held-out documents; 0 switches validation off")


class Log(_Section):
    every_steps: PositiveInt = 1
    tensorboard: bool = True
    stragglers_every: PositiveInt = Field(100, description="steps of one report of the slowest rank and stage")
    hang_seconds: PositiveFloat = Field(120.0, description="without progress before every rank says where it stands")
    peak_tflops: PositiveFloat | None = Field(None, description="of one rank's device, for MFU; known for common GPUs")


class Schema(_Section):
    """All sections."""

    model: Model
    layout: Layout = Layout()
    kernels: Kernels = Kernels()
    data: Data
    train: Train
    optimizer: Optimizer
    stability: Stability = Stability()
    checkpoint: Checkpoint = Checkpoint()
    validation: Validation = Validation()
    log: Log = Log()

    @property
    def mesh(self) -> Mesh:
        if self.layout.dp is None:
            raise ConfigError("layout.dp is not settled yet: call config.on(world_size) first")
        return Mesh(dp=self.layout.dp, pp=self.layout.pp, tp=self.layout.tp)

    @property
    def microbatches(self) -> int:
        """Micro-batches of one rank in one step of a whole global batch; a ramp begins with fewer."""
        return self.train.global_batch // (self.layout.micro_batch * self.mesh.dp)

    @property
    def settled(self) -> bool:
        """Whether the length of every stage is known in tokens: that of epochs is when the data is opened."""
        return all(stage.tokens is not None for stage in self.data.stages)

    @property
    def total_tokens(self) -> int:
        assert self.settled, "megapoly.data.epochs.settle comes first"
        return sum(stage.tokens or 0 for stage in self.data.stages)

    @property
    def step_tokens(self) -> int:
        """Tokens of one step of a whole global batch; a ramp begins with fewer."""
        return self.train.global_batch * self.train.sequence

    @property
    def batches(self) -> Batches:
        """The size of every global batch of the run."""
        train, ramp = self.train, self.train.batch_ramp
        samples = self.total_tokens // train.sequence
        if ramp is None:
            return build_batches(samples, train.global_batch)
        return build_batches(samples, train.global_batch, ramp.start, ramp.increment, -(-ramp.tokens // train.sequence))

    @property
    def total_steps(self) -> int:
        return self.batches.total_steps
