"""Every setting of a run, its default and its rule. `recipe.py` reads them from a file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class BackboneConfig(Section):
    """Which frozen model, and how its weights are held; sharding changes no result."""

    path: str = "demo:smollm2-135m"
    """Hugging Face folder, hub name, `demo:smollm2-135m` (fetched once) or `demo:tiny-t5`."""
    revision: str | None = None
    """Hub revision; recorded in the run."""
    sharding: Literal["replicated", "zero3"] = "zero3"
    """zero3: each rank holds a part. `--deepspeed_config` decides this where it is given."""
    shard_group: Literal["world", "node"] = "world"
    """zero3 over all ranks, or within each node: then no weight crosses the network."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of activations and unquantized weights. fp16 is refused: T5's activations overflow in it."""
    quantization: Literal["none", "int8", "llm_int8", "nf4"] = "none"
    """int8: ours, weights only, replicated or zero3; llm_int8, nf4: bitsandbytes, replicated."""
    quantized_layers: Literal["blocks", "blocks_without_wo"] = "blocks"
    """All matrices of the layers, or all but the second feed-forward one (T5's `wo`)."""
    outlier_threshold: Annotated[float, Field(ge=0.0)] = 6.0
    """llm_int8: input columns with a greater magnitude are not quantized; 0: all are."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """zero3: where the parts lie. A ds_config's `offload_param` decides this where given."""
    offload_path: str | None = None
    """For `offload: nvme`: a folder on a local disk."""
    activation_checkpointing: Annotated[str, Field(pattern=r"^(none|full|every_[1-9]\d*)$")] = (
        "none"
    )
    """full: keep only each layer's input and compute it again; every_N: in each N-th layer."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout inside the frozen model while tuning; the paper's code has 0.1 in effect."""
    max_input_tokens: Positive = 512
    """Longer inputs are cut, counted and reported."""

    @model_validator(mode="after")
    def _check_cell(self) -> BackboneConfig:
        if self.quantization in ("llm_int8", "nf4") and self.sharding == "zero3":
            raise ValueError(
                f"quantization is {self.quantization!r}, which bitsandbytes holds whole on every "
                "rank, and sharding is 'zero3'. Set quantization=int8, or sharding=replicated."
            )
        if self.offload != "none" and self.sharding != "zero3":
            raise ValueError(
                f"offload is {self.offload!r}, which moves the parts of a sharded backbone, and "
                "sharding is 'replicated'. Set sharding=zero3, or offload=none."
            )
        if self.shard_group == "node" and self.sharding != "zero3":
            raise ValueError(
                "shard_group is 'node', but sharding is 'replicated'. Set sharding=zero3, or leave "
                "shard_group out."
            )
        if (self.offload == "nvme") != (self.offload_path is not None):
            raise ValueError(
                f"offload is {self.offload!r} and offload_path is {self.offload_path!r}; a path "
                "goes with nvme, and with nothing else."
            )
        return self


class SourceConfig(Section):
    """Where rows come from."""

    kind: Literal["files", "hub", "vader"] = "files"
    """files: jsonl, csv or parquet (gzip allowed); hub: a Hugging Face data set; vader: PyPI."""
    train: str | None = None
    """Path or hub split name."""
    validation: str | None = None
    """Path or hub split name; where absent, a tenth of train by hash of the text."""
    test: str | None = None
    """Path or hub split name; where absent, a tenth of train by hash of the text."""
    name: str | None = None
    """Hub data set name, or for vader: `movies` or `sources`."""
    subset: str | None = None
    """Hub configuration name."""
    revision: str | None = None
    """Hub revision; recorded in the run."""


class TaskConfig(Section):
    """Text in, label string out."""

    name: str = "vader-movies"
    source: SourceConfig = SourceConfig(kind="vader", name="movies")
    input_template: str = "{text}"
    """Field names in braces; the row's values are put in."""
    label_field: str = "label"
    labels: dict[str, str] = Field(
        default={"negative": "negative", "positive": "positive"}, min_length=1
    )
    """Value of `label_field` (as a string) -> the target text. Any other value is an error."""
    append_eos: bool = True
    """Whether the end-of-sequence piece belongs to the target (T5: yes)."""
    max_examples: Positive | None = None
    """Use only n training rows (after the split), a fair sample that is always the same."""


class PromptConfig(Section):
    """The soft prompt [P, D]."""

    prompt_length: Annotated[int, Field(ge=1, le=1000)] = 100
    """P, number of trainable vectors."""
    initialisation: Literal[
        "class_labels",
        "sampled_vocabulary",
        "random_uniform_paper",
        "random_uniform_released",
        "text",
        "file",
    ] = "class_labels"
    """paper: U[-0.5, 0.5]; released: U[0, 0.5), what the paper's released code samples."""
    sampled_vocabulary_size: Positive = 5000
    """How many of the most common pieces are in the pool."""
    text: str | None = None
    """For `text`: piece j goes to row j, the rest from sampled vocabulary."""
    file: str | None = None
    """For `file`: a prompt file of the same length, width and backbone."""


class OptimizerConfig(Section):
    """Settings of T5X's Adafactor as the paper used it, or AdamW."""

    name: Literal["adafactor", "adamw"] = "adafactor"
    learning_rate: Annotated[float, Field(gt=0)] = 0.3
    """Constant after warm-up, but for `linear_decay_steps`."""
    warmup_steps: NotNegative = 0
    """Linear warm-up; the paper has none."""
    linear_decay_steps: Positive | None = None
    """The rate falls linearly from step 0 to 0 at this step; the paper's is constant."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-5
    """Adafactor: not multiplied by the learning rate (T5X). AdamW: multiplied by it (torch)."""
    decay_rate: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """beta2 = 1 - (step + 1) ** -decay_rate."""
    start_step: NotNegative = 0
    """Step number of the first update; the paper's runs start at 1,100,000."""
    step_offset: NotNegative = 0
    """Subtracted from the step number in the decay schedule."""
    clipping_threshold: Annotated[float, Field(gt=0)] | None = 1.0
    """Root mean square of the update, over the whole tensor, is clipped to this."""
    multiply_by_parameter_scale: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW only."""


class BatchConfig(Section):
    """How many examples make an update, and how many fit a device at once."""

    global_batch_size: Positive = 32
    micro_batch_size: Positive = 4


class EvaluationConfig(Section):
    """When and how the prompt is scored."""

    every_steps: Positive = 1000
    method: Literal["rank", "greedy"] = "greedy"
    """greedy: free generation as in the paper; rank: the most likely string of the label set."""
    max_validation_examples: Positive | None = None
    max_test_examples: Positive | None = None
    batch_size: Positive = 8
    """Rows per rank at a time."""


class CheckpointConfig(Section):
    """What is saved for a resume."""

    every_steps: Positive = 1000
    keep_last: Positive = 3


class TuneConfig(Section):
    """Everything `softprompt train` needs. Saved to the run directory as `config.yaml`."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    run_directory: str | None = None
    """Default: runs/<name>."""
    seed: NotNegative = 0
    steps: Positive = 30000
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of log(Z)^2; T5X uses 1e-4."""
    deepspeed_config: str | None = None
    """JSON for the engine's plumbing; decides sharding, dtype and off-load where given."""
    backbone: BackboneConfig = BackboneConfig()
    task: TaskConfig = TaskConfig()
    prompt: PromptConfig = PromptConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig = BatchConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _check_sections_agree(self) -> TuneConfig:
        for kind in ("text", "file"):
            given = getattr(self.prompt, kind)
            wanted = self.prompt.initialisation == kind
            if wanted and not given:
                raise ValueError(
                    f"prompt.initialisation is {kind!r}, so prompt.{kind} must be given."
                )
            if given and not wanted:
                raise ValueError(
                    f"prompt.{kind} is given, but prompt.initialisation is "
                    f"{self.prompt.initialisation!r}. Set prompt.initialisation={kind}."
                )
        decay_steps = self.optimizer.linear_decay_steps
        if decay_steps is not None and self.steps > decay_steps:
            raise ValueError(
                f"steps is {self.steps}, but the learning rate is 0 from step {decay_steps} on. "
                "Set optimizer.linear_decay_steps to the number of steps, or leave it out."
            )
        if self.evaluation.method == "greedy" and not self.task.append_eos:
            raise ValueError(
                "evaluation.method is 'greedy' and task.append_eos is false, so no answer "
                "would ever "
                "end. Set evaluation.method=rank or task.append_eos=true."
            )
        return self


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
