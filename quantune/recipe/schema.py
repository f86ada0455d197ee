"""The recipe language: one attrs class a table, one field a key.

The string under each field is its documentation: `docs/recipe.md` is generated from it. Checks that concern one value
are validators here; checks that concern several values stand in `quantune.recipe.conflicts`.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import attrs

from quantune.recipe.checks import (
    at_least,
    between,
    count_or_fraction,
    finite,
    not_empty,
    patterns,
    positive,
    positive_or_auto,
)

ROLES = ("system", "user", "assistant", "tool")
"""Who can say something in a conversation."""
ALL_LINEAR = "all-linear"
"""`[adapter] targets` that are every linear layer but the output head."""
Format = Literal["chat", "instruct", "alpaca", "completion"]
"""What the rows of a source are."""
FORMATS: tuple[Format, ...] = get_args(Format)


@attrs.frozen(kw_only=True)
class SpecialTokensConfig:
    """The tokenizer's special tokens, where they are to be others than its own."""

    bos_token: str | None = attrs.field(default=None, validator=attrs.validators.optional(not_empty))
    """Begins a text."""
    eos_token: str | None = attrs.field(default=None, validator=attrs.validators.optional(not_empty))
    """Ends a text."""
    pad_token: str | None = attrs.field(default=None, validator=attrs.validators.optional(not_empty))
    """Fills up batches."""
    unk_token: str | None = attrs.field(default=None, validator=attrs.validators.optional(not_empty))
    """Stands for what the vocabulary lacks."""
    additional_special_tokens: tuple[str, ...] = attrs.field(default=(), validator=patterns)
    """More tokens that are never split and that generated text leaves out."""


@attrs.frozen(kw_only=True)
class ModelConfig:
    """The base model."""

    base: str = attrs.field(validator=not_empty)
    """A folder in the transformers format (safetensors; relative to the recipe), a hub id, or `builtin:mini`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    tokenizer: str | None = None
    """A folder or hub id to take the tokenizer from; the base's own by default."""
    chat_template: str | None = None
    """What replaces the tokenizer's own chat template: a Jinja file, or the name of a template that comes with quantune
    (`chatml`, `llama3`, ...; docs/data.md lists them)."""
    special_tokens: SpecialTokensConfig = attrs.field(factory=SpecialTokensConfig)
    """Special tokens that differ from the tokenizer's own. One that the vocabulary lacks is added to it."""
    added_tokens: tuple[str, ...] = attrs.field(default=(), validator=patterns)
    """Ordinary tokens added to the vocabulary. The embeddings grow as needed; new rows begin at the mean of the old
    ones and are trained only with `[adapter] modules_to_save`."""
    pad_vocabulary_to_multiple_of: int | None = attrs.field(default=None, validator=attrs.validators.optional(positive))
    """Grow the embeddings to a multiple of this many rows."""
    config: dict[str, Any] = attrs.field(factory=dict)
    """Values that replace those of the base's `config.json`, e.g. `rope_scaling`; an unknown one is an error."""
    attn_implementation: Literal[
        "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = "auto"
    """Which attention transformers uses; `auto` leaves the choice to it."""
    trust_remote_code: bool = False
    """Run Python code that comes with the base. Needs the flag `--trust-remote-code` as well."""


@attrs.frozen(kw_only=True)
class QuantizationConfig:
    """How the frozen base is stored. The table takes the chosen backend's own options as well."""

    backend: str = attrs.field(validator=not_empty)
    """A backend that `quantune backends list` shows."""
    skip: tuple[str, ...] = attrs.field(default=(), validator=patterns)
    """Modules kept in full precision besides embeddings and the output head: dotted names or parts of them, `*` matches
    within a part (`layers.0`, `mlp.down_proj`, `*_proj`)."""
    experts: bool = True
    """Pack the fused experts of mixture models as well; `false` keeps them in full precision."""
    options: Any = None
    """The backend's options, structured by its own attrs class; their keys stand in the same table."""


@attrs.frozen(kw_only=True)
class AdapterConfig:
    """What is trained."""

    type: Literal["lora", "full"] = "lora"
    """`lora`: a low-rank update of the weights of `targets`. `full`: the weights of `targets` themselves, which are
    saved as an adapter that holds them whole. Over a base that [quantization] packs it needs `[training.qat]`."""
    r: int = attrs.field(default=16, validator=positive)
    """Rank of the update."""
    alpha: float = attrs.field(default=32.0, validator=[positive, finite])
    """The update is scaled by alpha / r, with `use_rslora` by alpha / sqrt(r)."""
    dropout: float = attrs.field(default=0.0, validator=between(0.0, 1.0, right_open=True))
    """Probability of dropping an input of the adapter in training."""
    targets: str | tuple[str, ...] = attrs.field(default=ALL_LINEAR, validator=patterns)
    """`all-linear` (every linear layer but the output head), a list of name suffixes (`["q_proj", "v_proj"]`; among
    them may be `all-linear`, the output head and embeddings; empty with `target_parameters` alone), or one regular
    expression that must match a linear layer's whole name."""
    target_parameters: tuple[str, ...] = attrs.field(default=(), validator=patterns)
    """Weights of fused experts to adapt as well, as suffixes of their names, e.g. `["mlp.experts.gate_up_proj"]`."""
    start_from: str | None = attrs.field(default=None, validator=attrs.validators.optional(not_empty))
    """An adapter folder whose weights training starts from, relative to the recipe; it must have this table's shape."""
    use_rslora: bool = False
    """Rank-stabilized scaling, alpha / sqrt(r)."""
    use_dora: bool = False
    """Weight-decomposed adaptation: magnitude and direction of each weight are trained apart."""
    init: Literal["default", "gaussian", "pissa", "olora", "loftq"] = "default"
    """How the update begins. `default` and `gaussian`: at zero. `pissa`: with the principal singular vectors of each
    weight; `olora`: with its QR decomposition, alpha / r times, so that a large alpha leaves more than the weight was;
    both are taken out of the base before it is packed. `loftq`: with what packing would lose, so that base and update
    together come closest to the weight."""
    loftq_iterations: int = attrs.field(default=1, validator=positive)
    """`loftq`: how often packing and fitting the update take turns."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Which biases are trained too: those of the adapted layers, or all."""
    modules_to_save: tuple[str, ...] = attrs.field(default=(), validator=patterns)
    """Modules trained in full and saved with the adapter, e.g. `["lm_head", "embed_tokens"]`."""


@attrs.frozen(kw_only=True)
class SourceConfig:
    """One source of samples: a file, or a dataset of the hub."""

    path: str | None = None
    """A `.jsonl`, `.json`, `.csv` or `.parquet` file, relative to the recipe."""
    dataset: str | None = None
    """A hub dataset's id, in place of `path` (needs the extra `datasets`)."""
    data_files: tuple[str, ...] = attrs.field(default=(), validator=patterns)
    """Files of the hub dataset to read, in place of all."""
    name: str | None = None
    """The hub dataset's configuration."""
    split: str = "train"
    """The hub dataset's split; slices such as `train[:20%]` or `train[100:200]` work, for a file too."""
    revision: str | None = None
    """Branch, tag or commit of the hub dataset."""
    format: Format
    """`chat`: a list of role/content messages, rendered with the chat template. `instruct`: a prompt and a response.
    `alpaca`: the columns `instruction`, `input` (may be empty) and `output` in Stanford Alpaca's two prompts.
    `completion`: plain text."""
    messages_column: str = "messages"
    """`chat`: the column that holds the messages."""
    message_keys: dict[str, str] = attrs.field(factory=dict)
    """`chat`: what the keys of a message are called, e.g. `{role = "from", content = "value"}`."""
    roles: dict[str, tuple[str, ...]] = attrs.field(factory=dict)
    """`chat`: what the roles are called, e.g. `{user = ["human"], assistant = ["gpt"]}`, beside their own names."""
    drop_system_message: bool = False
    """`chat`: leave out a system message at the beginning."""
    prompt_column: str = "prompt"
    """`instruct`: the column that holds the prompt."""
    response_column: str = "response"
    """`instruct`: the column that holds the response."""
    text_column: str = "text"
    """`completion`: the column that holds the text."""
    template: str | None = None
    """`instruct`: the prompt as text with columns in braces, e.g. `"Q: {prompt}\\nA: "`. Without it the prompt and the
    response become a user and an assistant message of the chat template."""
    input_column: str | None = None
    """`instruct`: a column that may be empty or missing; where it is, `template_no_input` is the prompt."""
    template_no_input: str | None = None
    """`instruct`: the template of rows whose `input_column` is empty."""
    loss_on: Literal["assistant", "all"] | tuple[str, ...] = "assistant"
    """Which tokens are targets: what the assistant says up to and including the end token, everything, or what the
    roles in a list say (`["assistant", "tool"]`). `completion` trains on everything."""
    train_on_eos: Literal["turn", "all", "last", "none"] = "turn"
    """`chat`: which end tokens are targets: those of the turns that are trained on, those of all turns, the last one
    alone, or none."""
    limit: int | None = attrs.field(default=None, validator=attrs.validators.optional(positive))
    """Take only the first so many rows."""


@attrs.frozen(kw_only=True)
class DataConfig:
    """What is trained and evaluated on."""

    train: tuple[SourceConfig, ...] = attrs.field(validator=not_empty)
    """The training sources, `[[data.train]]`."""
    eval: tuple[SourceConfig, ...] = ()
    """The evaluation sources, `[[data.eval]]`."""
    eval_size: int | float | None = attrs.field(default=None, validator=attrs.validators.optional(count_or_fraction))
    """Hold out so many training samples, or this fraction of them, drawn by the seed, and evaluate on them; in place of
    `[[data.eval]]`."""
    max_length: int = attrs.field(default=1024, validator=at_least(2))
    """Most tokens in a sample, and with `packing` in a row."""
    overlong: Literal["drop", "truncate", "split", "error"] = "drop"
    """What happens to a sample over `max_length`: it is dropped, its end is cut, or `completion` text is split into
    several samples (of other formats it is dropped), and counted; or the run stops."""
    packing: bool = False
    """Put several samples into one row of up to `max_length` tokens, each of which attends to itself alone.
    `batch_size` and `micro_batch_size` then count rows."""
    pad_to_max_length: bool = False
    """Pad every batch to `max_length`: shapes never change, which `compile` and some kernels like."""
    shuffle: bool = True
    """Visit the samples in an order drawn from (seed, epoch); otherwise in the order of the files."""


@attrs.frozen(kw_only=True)
class QatConfig:
    """Quantization-aware training: what is trained computes as it will when it is packed in the format of
    `[quantization]`, in training from `fake_quant_after_steps` on and in every evaluation. The header alone takes every
    default."""

    lora_base: Literal["dense", "packed"] = "dense"
    """What the sum of base and adapter is made of before it is rounded. `dense`: of the original weights, which the
    adapted layers then hold in full size. `packed`: of the packed weights, which takes no more memory and learns less:
    a weight that lies on the format's grid already leaves it only for a large update."""
    activation_dtype: Literal["int8", "fp8"] | None = None
    """Round the inputs of packed layers too, each token by a scale of its own, as a reader of the format does that
    computes in 8 bits: `int8` with the torchao backend's int8, `fp8` with its fp8."""
    fake_quant_after_steps: int = attrs.field(default=0, validator=at_least(0))
    """Train so many steps without rounding what is trained. Rounding is noisy: for fine formats (nf4, int4) the last
    40 % of a run are enough."""


@attrs.frozen(kw_only=True)
class TrainingConfig:
    """The optimization."""

    max_steps: int | None = attrs.field(default=None, validator=attrs.validators.optional(positive))
    """Optimizer steps. Give this or `epochs`."""
    epochs: float | None = attrs.field(default=None, validator=attrs.validators.optional(positive))
    """Passes over the training data, 1 when neither is given."""
    batch_size: int = attrs.field(default=8, validator=positive)
    """Samples per optimizer step, over all micro-batches and processes."""
    micro_batch_size: int | Literal["auto"] = attrs.field(default="auto", validator=positive_or_auto)
    """Samples per forward pass; must divide `batch_size`. `auto`: the largest divisor that keeps a micro-batch within
    16,384 tokens."""
    learning_rate: float = attrs.field(default=2e-4, validator=[positive, finite])
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up, towards `min_lr_ratio` of its peak."""
    min_lr_ratio: float = attrs.field(default=0.0, validator=between(0.0, 1.0))
    """Where the schedule ends, as a fraction of the peak."""
    warmup_steps: int | None = attrs.field(default=None, validator=attrs.validators.optional(at_least(0)))
    """Steps over which the learning rate rises to its peak. Give this or `warmup_ratio`."""
    warmup_ratio: float | None = attrs.field(
        default=None, validator=attrs.validators.optional(between(0.0, 1.0, right_open=True))
    )
    """The warm-up as a fraction of all steps, 0.03 when neither is given."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """AdamW, or AdamW whose moments are stored in 8 bit (bitsandbytes). The paged ones need a GPU and let the
    moments move to the CPU's memory when the GPU's is full. Several processes share the moments of `adamw`, and of no
    other."""
    beta1: float = attrs.field(default=0.9, validator=between(0.0, 1.0, right_open=True))
    """Decay of AdamW's first moment."""
    beta2: float = attrs.field(default=0.999, validator=between(0.0, 1.0, right_open=True))
    """Decay of AdamW's second moment."""
    eps: float = attrs.field(default=1e-8, validator=[positive, finite])
    """AdamW's epsilon."""
    weight_decay: float = attrs.field(default=0.0, validator=[at_least(0.0), finite])
    """Decoupled weight decay."""
    loraplus_lr_ratio: float | None = attrs.field(default=None, validator=attrs.validators.optional((positive, finite)))
    """LoRA+: the learning rate of the B matrices is this many times that of everything else."""
    max_grad_norm: float = attrs.field(default=1.0, validator=positive)
    """Gradients whose norm is larger are scaled down to it; `inf` clips nothing."""
    activation_checkpointing: bool | Literal["offload"] = False
    """Recompute each block's activations in the backward pass: less memory, about a third more time. `offload` also
    keeps the inputs of the blocks in the CPU's memory."""
    compile: bool = False
    """Compile each block with `torch.compile` for training steps. Costs up to minutes at the first step."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute dtype of the base. `auto`: bf16 where the device has fast bf16 arithmetic, otherwise fp32. Adapters and
    optimizer state are always fp32."""
    tf32: bool = False
    """Let a GPU compute fp32 matrix products in TF32: faster, with 10 bits of mantissa. With `precision = "bf16"` only
    what is trained computes in fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto` takes a GPU when there is one."""
    seed: int = attrs.field(default=42, validator=at_least(0))
    """Seeds the adapter's initialization, the order of the data, and dropout."""
    qat: QatConfig | None = None
    """`[training.qat]`: train for the format of `[quantization]`, so that packing what was trained loses nothing."""


@attrs.frozen(kw_only=True)
class EvaluationConfig:
    """How `[[data.eval]]` is used."""

    every_steps: int | None = attrs.field(default=None, validator=attrs.validators.optional(positive))
    """Evaluate every so many steps."""
    per_epoch: int | None = attrs.field(default=None, validator=attrs.validators.optional(positive))
    """Evaluate so many times an epoch, in place of `every_steps`."""
    at_start: bool = False
    """Evaluate before the first step."""
    at_end: bool = True
    """Evaluate after the last step."""
    batch_size: int = attrs.field(default=16, validator=positive)
    """Samples per forward pass of an evaluation."""
    exact_match: bool = False
    """Also generate an answer to every prompt (greedily) and report the share that equals the reference."""
    max_new_tokens: int = attrs.field(default=128, validator=positive)
    """Most tokens generated for one answer."""
    max_samples: int | None = attrs.field(default=None, validator=attrs.validators.optional(positive))
    """Use only the first so many evaluation samples."""


@attrs.frozen(kw_only=True)
class CheckpointConfig:
    """What a run can be resumed from."""

    every_steps: int | None = attrs.field(default=None, validator=attrs.validators.optional(positive))
    """Write a checkpoint every so many steps; one is always written at the end."""
    per_epoch: int | None = attrs.field(default=None, validator=attrs.validators.optional(positive))
    """Write so many checkpoints an epoch, in place of `every_steps`."""
    keep: int = attrs.field(default=2, validator=at_least(2))
    """How many checkpoints to keep. At least 2, so that a damaged one has a predecessor."""


@attrs.frozen(kw_only=True)
class LoggingConfig:
    """What is reported while training."""

    every_steps: int = attrs.field(default=10, validator=positive)
    """Report every so many steps; `metrics.jsonl` gets every step."""


@attrs.frozen(kw_only=True)
class DistributedConfig:
    """The processes of a run."""

    processes: int | Literal["auto"] = attrs.field(default="auto", validator=positive_or_auto)
    """Processes on this machine, each with a device of its own; the base and what is trained are sharded among them.
    `auto`: one for each GPU, or one where there is none. Started by torchrun or srun, a run has the processes that it
    was started with."""
    max_restarts: int = attrs.field(default=3, validator=at_least(0))
    """How often all processes are started again, from the last checkpoint, when one of them dies."""
    timeout: float = attrs.field(default=600.0, validator=[positive, finite])
    """Seconds after which a process that the others wait for counts as hung. While the base is loaded, twice that."""
    cpu_offload: bool = False
    """Keep each process's share of the weights and the optimizer's state in the CPU's memory, and copy what a block
    needs to the GPU."""
    threads: int | Literal["auto"] = attrs.field(default="auto", validator=positive_or_auto)
    """CPU threads of each process; `auto` shares the CPU's cores among the processes (or takes OMP_NUM_THREADS)."""


@attrs.frozen(kw_only=True)
class OutputConfig:
    """Where results go."""

    dir: str | Literal["auto"] = attrs.field(default="auto", validator=not_empty)
    """The run folder, relative to the current directory; `auto` is `runs/<name of the recipe>`."""


@attrs.frozen(kw_only=True)
class Recipe:
    """A whole run."""

    model: ModelConfig
    """`[model]`: the base model."""
    quantization: QuantizationConfig | None = None
    """`[quantization]`: how the frozen base is stored; left out, the base stays as it is."""
    adapter: AdapterConfig
    """`[adapter]`: what is trained; the header alone takes every default."""
    data: DataConfig
    """`[data]`: what is trained and evaluated on."""
    training: TrainingConfig = attrs.field(factory=TrainingConfig)
    """`[training]`: the optimization."""
    evaluation: EvaluationConfig = attrs.field(factory=EvaluationConfig)
    """`[evaluation]`: how the evaluation data is used."""
    checkpoint: CheckpointConfig = attrs.field(factory=CheckpointConfig)
    """`[checkpoint]`: what a run can be resumed from."""
    logging: LoggingConfig = attrs.field(factory=LoggingConfig)
    """`[logging]`: what is reported while training."""
    distributed: DistributedConfig = attrs.field(factory=DistributedConfig)
    """`[distributed]`: the processes of a run."""
    output: OutputConfig = attrs.field(factory=OutputConfig)
    """`[output]`: where results go."""
