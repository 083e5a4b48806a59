"""Every setting of `softprompt adapt`, its default and its rule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from softprompt_dist.section import BatchConfig, CheckpointConfig, NotNegative, Positive, Section


class ArchitectureConfig(Section):
    """A T5 v1.1 made from nothing (`init: from_config`). Its head is always its own."""

    d_model: Positive = 192
    d_kv: Positive = 32
    d_ff: Positive = 512
    num_heads: Positive = 6
    num_layers: Positive = 4
    num_decoder_layers: Positive = 3


class AdaptConfig(Section):
    """Everything `softprompt adapt` needs: all weights of a T5 v1.1, on plain text."""

    name: str = Field(default="adapt", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    run_directory: str | None = None
    seed: NotNegative = 0
    steps: Positive = 100000
    init: Literal["from_config", "from_checkpoint"] = "from_checkpoint"
    backbone: str | None = None
    """For `from_checkpoint`: a Hugging Face folder, hub name or `demo:` name."""
    architecture: ArchitectureConfig = ArchitectureConfig()
    """For `from_config`."""
    tokenizer: str | None = None
    """Folder of the tokenizer; default: beside the backbone."""
    corpus: list[str] = Field(min_length=1)
    """Text files (one document a line; .gz and .xz too). `path*3`: three times an epoch."""
    validation_corpus: list[str] = []
    objective: Literal["span_corruption", "prefix_lm"] = "prefix_lm"
    noise_density: Annotated[float, Field(gt=0, lt=1)] = 0.15
    mean_noise_span_length: Annotated[float, Field(ge=1)] = 3.0
    inputs_length: Annotated[int, Field(ge=8)] = 512
    targets_length: Annotated[int, Field(ge=8)] = 512
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
    export_dtype: Literal["fp32", "bf16"] = "fp32"
    batch: BatchConfig = BatchConfig()
    log_every_steps: Positive = 10
    max_validation_examples: Positive = 512
    evaluate_every_steps: Positive = 1000
    checkpoint: CheckpointConfig = CheckpointConfig()
    export_steps: list[Positive] = []
    """Steps at which a Hugging Face folder is written, besides the last."""
