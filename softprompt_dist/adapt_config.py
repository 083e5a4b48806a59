"""Every setting of `softprompt adapt`, its default and its rule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from softprompt_dist.names import Name
from softprompt_dist.section import (
    BatchConfig,
    CheckpointConfig,
    HealthConfig,
    NotNegative,
    PathName,
    Positive,
    Section,
)


class ArchitectureConfig(Section):
    """A T5 v1.1 made from nothing (`init: from_config`). Its head is always its own."""

    d_model: Positive = 192
    d_kv: Positive = 32
    d_ff: Positive = 512
    num_heads: Positive = 6
    num_layers: Positive = 4
    num_decoder_layers: Positive = 3


class EngineConfig(Section):
    """How DeepSpeed spreads weights, gradients and optimizer over the ranks."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """0: all on every rank; 1: optimizer sharded; 2: gradients, too; 3: weights, too."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """cpu: fp32 weights and optimizer state in the node's memory (stages 1 to 3)."""
    activation_checkpointing: bool = False
    """Keep only each layer's input and compute the rest again in the backward pass."""

    @model_validator(mode="after")
    def _check_offloading(self) -> EngineConfig:
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError(
                f"offload_optimizer is {self.offload_optimizer!r}, but zero_stage is 0; it needs "
                "stage 1, 2 or 3. Set zero_stage=2, or offload_optimizer=none."
            )
        return self


class AdaptEvaluationConfig(Section):
    """What is measured on `validation_corpus`."""

    every_steps: Positive = 1000
    max_examples: Positive = 512
    """The first so many examples of the text, always the same ones."""


class ExportConfig(Section):
    """The Hugging Face folders that a run leaves behind."""

    steps: list[Positive] = []
    """A folder is written at these steps, besides the last."""
    dtypes: list[Literal["fp32", "bf16"]] = Field(default=["fp32"], min_length=1)
    """Each makes a folder: `export`, and `export-bf16` beside it."""
    max_shard_gigabytes: Annotated[float, Field(gt=0)] = 5.0
    """Larger weights are split over several files, with an index."""


class AdaptCheckpointConfig(CheckpointConfig):
    """What is saved for a resume, and how."""

    background: bool = True
    """Train on while a checkpoint is written, from a copy in the nodes' memory: 4 bytes a weight
    and the optimizer's state, dealt over the ranks. false where memory is short."""


class AdaptConfig(Section):
    """Everything `softprompt adapt` needs: all weights of a language model, on plain text."""

    name: Name = "adapt"
    run_directory: PathName | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    steps: Positive = 100000
    init: Literal["from_config", "from_checkpoint"] = "from_checkpoint"
    backbone: PathName | None = None
    """For `from_checkpoint`: a Hugging Face folder, hub name or `demo:` name."""
    architecture: ArchitectureConfig = ArchitectureConfig()
    """For `from_config`."""
    tokenizer: PathName | None = None
    """Folder of the tokenizer; default: beside the backbone."""
    corpus: list[PathName] = Field(min_length=1)
    """Folders of `softprompt corpus build`, or text files (one document a line; .gz and .xz too),
    which are tokenised before the first step. `path*3`: three times an epoch."""
    validation_corpus: list[PathName] = []
    verify_corpus: bool = True
    """Compare the checksums of built folders before the first step, dealt over the ranks. Their
    sizes are compared in any case."""
    objective: Literal["span_corruption", "prefix_lm", "lm"] = "prefix_lm"
    """lm: the next token, for decoder-only backbones."""
    packing: Literal["none", "greedy", "complementary_pairs"] = "greedy"
    """How `prefix_lm` fills rows. none: one example each; greedy: as many whole ones as fit, as T5
    does; complementary_pairs: two stretches of running text, one's prefix with the other's, which
    leaves no padding (BigScience). The rows of the other objectives are always full."""
    noise_density: Annotated[float, Field(gt=0, lt=1)] = 0.15
    mean_noise_span_length: Annotated[float, Field(ge=1)] = 3.0
    inputs_length: Annotated[int, Field(ge=8)] = 512
    """Encoder positions of a row; `lm` has none."""
    targets_length: Annotated[int, Field(ge=8)] = 512
    """Decoder positions of a row."""
    z_loss: Annotated[float, Field(ge=0)] = 1e-4
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    optimizer: Literal["adafactor", "adamw", "rms_scaled_adamw"] = "adafactor"
    """rms_scaled_adamw: steps relative to each matrix's root mean square; good from scratch."""
    learning_rate: Annotated[float, Field(gt=0)] = 1.0
    """Peak; with `rsqrt` the rate is learning_rate / sqrt(max(step + start_step, warmup_steps))."""
    schedule: Literal["rsqrt", "constant", "cosine"] = "rsqrt"
    warmup_steps: NotNegative = 10000
    start_step: NotNegative = 1000000
    """The clock of `rsqrt`; the decay of Adafactor always counts from this run's start."""
    decay_steps: NotNegative = 0
    """The last so many steps also bring the rate down to 0, linearly."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_gradient_norm: Annotated[float, Field(gt=0)] | None = None
    """Clip the gradient of all weights together to this norm; T5 does not clip."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products in bf16, weights and optimizer in fp32."""
    compile: bool = False
    """Use torch.compile; pays off after minutes of training."""
    engine: EngineConfig = EngineConfig()
    batch: BatchConfig = BatchConfig()
    """Both count rows."""
    log_every_steps: Positive = 10
    evaluation: AdaptEvaluationConfig = AdaptEvaluationConfig()
    checkpoint: AdaptCheckpointConfig = AdaptCheckpointConfig()
    export: ExportConfig = ExportConfig()
    health: HealthConfig = HealthConfig()

    @model_validator(mode="after")
    def _check_rate(self) -> AdaptConfig:
        if self.schedule != "rsqrt" and "learning_rate" not in self.model_fields_set:
            raise ValueError(
                f"learning_rate must be set where schedule is {self.schedule!r}: its default, 1.0, "
                "is that of rsqrt, which divides it by a root of the step. Set learning_rate."
            )
        return self
