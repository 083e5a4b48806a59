"""Every setting of a run, its default and its rule. `recipe.py` reads them from a file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from softprompt_dist.names import Name, name_of
from softprompt_dist.section import (
    BatchConfig,
    CheckpointConfig,
    HealthConfig,
    NotNegative,
    PathName,
    Positive,
    Section,
)
from softprompt_dist.task_config import (
    MixtureConfig,
    TaskConfig,
    TransferConfig,
)


class BackboneConfig(Section):
    """Which frozen model, and how its weights are held; sharding changes no result."""

    path: PathName = "demo:smollm2-135m"
    """Hugging Face folder, hub name, `demo:smollm2-135m` (fetched once) or `demo:tiny-t5`."""
    revision: str | None = None
    """Revision of a hub name; refused of a folder."""
    sharding: Literal["replicated", "zero3"] = "zero3"
    """zero3: each rank holds a part; a single one holds it whole, unless it off-loads.
    `--deepspeed_config` decides this where it is given."""
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
    offload_path: PathName | None = None
    """For `offload: nvme`: a folder on a local disk."""
    activation_checkpointing: Annotated[str, Field(pattern=r"^(none|full|every_[1-9]\d*)$")] = (
        "none"
    )
    """full: keep only each layer's input and compute it again; every_N: in each N-th layer."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout inside the frozen model while tuning; the paper's code has 0.1 in effect."""
    max_input_tokens: Positive = 512
    """Longer inputs are cut, counted and reported."""
    prepend_bos: bool | None = None
    """Decoder-only: whether the begin-of-sequence piece stands before each input, behind the prompt
    (as PEFT has it). Default: as the tokenizer itself does."""

    def held_by(self, num_ranks: int) -> BackboneConfig:
        """As so many ranks hold it: one alone has nobody to share with, and so holds it whole."""
        if num_ranks > 1 or self.sharding == "replicated" or self.offload != "none":
            return self
        return self.model_copy(update={"sharding": "replicated", "shard_group": "world"})

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
    file: PathName | None = None
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


class TuningBatchConfig(BatchConfig):
    """How many examples make an update, and how many fit a device at once."""

    micro_batch_tokens: Positive | None = None
    """Instead of micro_batch_size: rows of about one length, as many as fit this many positions
    (prompt, longest input and target of the micro-batch, times its rows)."""


class EvaluationConfig(Section):
    """When and how the prompt is scored."""

    every_steps: Positive = 1000
    method: Literal["rank", "greedy"] = "greedy"
    """greedy: free generation as in the paper; rank: the most likely string of the label set."""
    length_normalisation: Literal["none", "tokens", "characters"] = "none"
    """rank: a label's log-probability as it is, or divided by the label's tokens or characters."""
    max_target_tokens: Positive | None = None
    """greedy: answers end here. Default: the longest target of the split that is scored (T5X).
    Not counting `task.target_prefix`."""
    max_validation_examples: Positive | None = None
    max_test_examples: Positive | None = None
    batch_tokens: Positive | None = None
    """Positions (prompt, longest input and answers, times rows) that a rank scores at a time.
    Default: 4,096 on CPUs; on GPUs what fits beside the backbone, at most 65,536."""
    early_stopping_patience: Positive | None = None
    """End after so many validations in a row that were no better than the best before."""


class TuneConfig(Section):
    """Everything `softprompt train` needs. Saved to the run directory as `config.yaml`."""

    name: Name = "run"
    run_directory: PathName | None = None
    """Default: runs/<name>."""
    seed: NotNegative = 0
    steps: Positive = 30000
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of log(Z)^2; T5X uses 1e-4."""
    deepspeed_config: PathName | None = None
    """JSON for the engine's plumbing; decides sharding, dtype and off-load where given."""
    backbone: BackboneConfig = BackboneConfig()
    task: TaskConfig = TaskConfig()
    mixture: MixtureConfig = MixtureConfig()
    transfer: list[TransferConfig] = Field(default=[], max_length=64)
    """Tasks on which the best prompt is scored after tuning, without tuning for them."""
    prompt: PromptConfig = PromptConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: TuningBatchConfig = TuningBatchConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    health: HealthConfig = HealthConfig()

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

    @model_validator(mode="after")
    def _check_transfer_prefixes(self) -> TuneConfig:
        tuned = [task.target_prefix for task in (self.task, *self.mixture.tasks)]
        for place, transfer in enumerate(self.transfer):
            # With `translate` answers are read as those of `task`.
            known = tuned[:1] if transfer.translate else tuned
            given = transfer.task.target_prefix
            if given not in known:
                raise ValueError(
                    f"transfer.{place}.task.target_prefix is {given!r}, but the prompt is tuned to "
                    f"answer with {' or '.join(map(repr, dict.fromkeys(known)))}. Set it to that."
                )
        return self

    @model_validator(mode="after")
    def _check_names_differ(self) -> TuneConfig:
        tuned = {f"mixture.tasks.{i}": task for i, task in enumerate(self.mixture.tasks)}
        scored = [(key, task, "test") for key, task in {"task": self.task, **tuned}.items()]
        scored += [(f"transfer.{i}.task", t.task, t.split) for i, t in enumerate(self.transfer)]
        for place, (key, task, split) in enumerate(scored):
            for earlier_key, earlier, earlier_split in scored[:place]:
                if name_of(task.name) != name_of(earlier.name):
                    continue
                if task != earlier or split == earlier_split:
                    raise ValueError(
                        f"{earlier_key}.name is {earlier.name!r} and {key}.name is {task.name!r}, "
                        f"so their results would lie in one place. Set another {key}.name."
                    )
        return self
