"""The typed, frozen configuration of a run. Every field's meaning, unit and default stands here and nowhere else.

A recipe (YAML) plus `key=value` overrides become one `RunConfig`; the resolved form is written into the run's folder.
lra/recipes.py reads files and overrides; this module only knows the fields and how they must fit together.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, field_validator, model_validator

import tasks.registry as tasks
from tasks.registry import TaskOptions

Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$"


class Section(BaseModel):
    """A group of fields: frozen, no unknown keys, no silent conversion of text to numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class DataConfig(Section):
    """Which examples are read, and how they become token sequences."""

    folder: str = "data"
    """Where the caches lie; made by `prepare`."""
    max_length: Positive | None = None
    """Tokens a sequence is cut to (the head is kept); null: the task's own."""
    split_rule: str | None = None
    """Name of the split rule; null: the task's first (listed by `list`)."""
    black_pixels: Literal["token", "not_key", "dropped"] = "token"
    """Image tasks. token: black is a symbol like any other. not_key: black pixels are computed but nobody attends to
    them (google masks keys only). dropped: they leave the batch; exact if outputs there are zeroed (Nystromformer)."""
    limit_train: Positive | None = None
    """Use only so many training examples, evenly spaced over the split (smoke recipes, overfitting checks)."""
    limit_eval: Positive | None = None
    """Use only so many validation and test examples, evenly spaced over the split (smoke recipes)."""
    limit_val: Positive | None = None
    """Use only so many validation examples, evenly spaced; null: limit_eval. The test split stays whole."""
    keep_tokens: list[Positive] = Field(default_factory=list)
    """Training on image tasks only: of each image keep so many tokens, a number drawn for each step from this list:
    every pixel of at least `foreground`, the rest random others. Empty: all. Evaluation has every token."""
    foreground: int = Field(default=8, ge=1, le=255)
    """keep_tokens: the byte from which on a pixel counts as foreground."""
    weigh_kept: bool = False
    """keep_tokens: log(all / kept) is added to the scores of a kept token as a key, counting the pixels that are
    foreground (or not) as it is: attention among the kept is then an unbiased sample of attention among all. Needs
    model.key_weights."""
    dihedral: bool = False
    """Training on square images: one of the 8 flips and quarter turns for each image and step (open track)."""
    mirror: bool = False
    """Training on square images: left and right are exchanged in half of them (open track)."""
    shift: int = Field(default=0, ge=0, le=32)
    """Training on square images: each is moved by up to so many pixels in either direction, black coming in (open
    track)."""
    shuffle_operands: bool = False
    """Training on ListOps: the operands of every operator come in random order, which changes no value (open track)."""
    fresh: bool = False
    """Training on generated images only: every step draws new ones from the task's generator (open track)."""
    fresh_lengths: list[Positive] = Field(default_factory=list)
    """fresh: contour lengths of the new Pathfinder images, in turn; empty: the task's own."""


class ModelConfig(Section):
    """The encoder and its classifier. Sizes are counts of features."""

    depth: Positive
    """Number of encoder layers."""
    width: Positive
    """Model width E."""
    num_heads: Positive
    qkv_width: Positive | None = None
    """Total width of all heads; null: the model width. Google's Pathfinder has 16 under a model width of 32."""
    mlp_width: Positive
    positions: Literal["sinusoidal", "learned", "rotary", "axial_rotary", "none"] = "sinusoidal"
    num_positions: Positive | None = None
    """Rows of a learned table without the CLS row; null: data.max_length. Nystromformer declares powers of two."""
    pooling: Literal["cls", "mean", "padded_mean", "max", "attention"] = "mean"
    """padded_mean divides the sum by the padded length `num_positions`, as protocols do that average over pads."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = Field(default=1e-6, gt=0)
    qk_norm: bool = False
    """RMS-normalise each head's queries and keys before the scores."""
    qk_gain: float = Field(default=1.0, gt=0)
    """qk_norm: what the queries' norm multiplies by at first (a trainable weight); scores start at most
    qk_gain * sqrt(head dim) apart from 0."""
    key_weights: bool = False
    """One pair of features of every head carries weights of keys (data.weigh_kept) instead of content."""
    attention_bias: bool = True
    """Biases in the four attention projections (google: none)."""
    input: Literal["embedding", "scalar"] = "embedding"
    """scalar: a pixel's value, scaled to [-1, 1], goes through one linear layer (S4, MEGA)."""
    vocab_size: Positive | None = None
    """Rows of the token table; null: the task's own (Nystromformer declares more than it uses)."""
    token_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial token table (google 1.0, Nystromformer 0.02)."""
    init: Literal["xavier", "default", "zero_head"] = "zero_head"
    """Linear layers: Xavier uniform with zero biases (google), PyTorch's own (Nystromformer), or PyTorch's own with the
    classifier's last layer at zero, so that the first loss is ln C (ours)."""
    dropout: Probability = 0.1
    attention_dropout: Probability = 0.1
    head_widths: list[Positive] = Field(default_factory=list)
    """Hidden widths of the classifier's ReLU layers."""
    pair_features: Literal["nli", "concat"] = "nli"
    """Retrieval: [x1, x2, x1*x2, x1-x2] (LRA paper, equation 1) or [x1, x2] (google's code)."""
    rotary_base: float = Field(default=10_000.0, gt=1)
    """Base b of the rotary frequencies b^(-2i/d); 100 resolves pixels, 10,000 is for text."""
    local_start: list[float] = Field(default_factory=list)
    """Rotary positions: biases of queries and keys start so that each head first looks at a place this far from its
    own (pixels, or tokens in 1-D), one distance a layer, repeated; lra/positions.py. Empty: off."""

    @property
    def attention_width(self) -> int:
        """Total width of all heads."""
        return self.qkv_width or self.width

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.attention_width // self.num_heads

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.attention_width % self.num_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must divide the attention width ({self.attention_width}); "
                "change num_heads, width or qkv_width"
            )
        if (self.qk_norm or self.key_weights or "rotary" in self.positions) and self.head_dim % 8:
            raise ValueError(
                f"qk_norm, key_weights and rotary positions need a head dim divisible by 8, it is {self.head_dim}"
            )
        if self.positions == "sinusoidal" and self.width % 2:
            raise ValueError(f"positions=sinusoidal needs an even width, it is {self.width}")
        if self.local_start and not ("rotary" in self.positions and self.attention_bias):
            raise ValueError(
                "local_start sets biases that act through rotary positions: it needs positions=rotary or "
                "axial_rotary, and attention_bias=true"
            )
        return self


class AttentionConfig(Section):
    """Which attention runs. `attention=flash` is shorthand for its backend and keeps the rest."""

    backend: str = "flash"
    """One of `run_lra.py list`: standard, flash, block_sparse, sdpa, or an approximate one of lra/mixers."""
    layout: Literal["butterfly", "dense", "local", "local_global", "stripes"] | None = None
    """block_sparse only: the pattern; null: butterfly."""
    block: Literal[64, 128] | None = None
    """block_sparse only: tokens on a side of a block; null: 64."""
    window: Positive = 1
    """local and local_global: blocks to each side."""
    num_global: Positive = 1
    """local_global: leading blocks that all attend to and that attend to all."""
    stride: Positive = 8
    """stripes: every so many blocks one attends to."""
    end_global: int = Field(default=0, ge=0)
    """block_sparse, any layout: trailing blocks that see all and that all see, for the CLS of an image."""
    deterministic: bool = False
    """Bit-equal backward from run to run."""

    @field_validator("backend")
    @classmethod
    def _known(cls, value: str) -> str:
        from lra.attention import backend_names

        if value not in backend_names():
            raise ValueError(f"must be one of {', '.join(backend_names())}")
        return value


class ScheduleConfig(Section):
    """Learning rate over steps; formulas in lra/optim.py."""

    name: Literal["rsqrt", "one_cycle", "cosine", "cosine_google", "constant", "wsd"] = "cosine"
    warmup: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    decay: float = Field(default=0.35, gt=0, le=1)
    """wsd: share of all steps, at the end, over which the rate falls linearly to 0."""


class RestartConfig(Section):
    """When a run counts as stuck at chance and begins again with another seed (lra/restarts.py)."""

    after: int = Field(default=1000, ge=0)
    """Steps before the rule begins to count."""
    steps: Positive = 500
    """Steps in a row, counted in windows of train.log_every, whose mean loss lies in the band."""
    low: float = 0.6931
    high: float = 0.6937
    limit: Positive = 3
    """Restarts at most; the attempt after them goes on to the end whatever its loss."""


class DenoiseConfig(Section):
    """Guessing hidden tokens beside classifying (lra/objective.py)."""

    rate: float = Field(default=0.15, gt=0, lt=1)
    """Share of the tokens that are hidden at first."""
    weight: float = Field(default=1.0, gt=0)
    """Factor of the guesses' cross-entropy in the loss at first."""
    until: float = Field(default=1.0, gt=0, le=1)
    """Share of all steps over which both fall linearly to 0."""


class TrainConfig(Section):
    """How the weights are found."""

    steps: Positive
    """Optimizer steps in all."""
    batch_size: Positive
    """Examples an optimizer step, over all GPUs and micro-batches."""
    accumulate: Positive = 1
    """Micro-batches an optimizer step is cut into, to save memory."""
    eval_batch_size: Positive | None = None
    """Examples an evaluation batch; null: batch_size / accumulate."""
    learning_rate: float = Field(gt=0)
    """The schedule's base (for rsqrt not the peak: lra_spec section 2.a)."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonalised momentum for the weight matrices of the layers, AdamW for everything else."""
    adamw_learning_rate: float | None = Field(default=None, gt=0)
    """muon: the base rate of what AdamW moves, under the same schedule; null: learning_rate."""
    momentum: Probability = 0.95
    """muon: decay of the (Nesterov) momentum."""
    schedule: ScheduleConfig = ScheduleConfig()
    betas: list[Probability] = Field(default=[0.9, 0.98], min_length=2, max_length=2)
    eps: float = Field(default=1e-9, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled, times the learning rate, on every parameter (as flax Adam in LRA)."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest global gradient norm; null: no clipping."""
    label_smoothing: Probability = 0.0
    """Share of the target that is spread evenly over all classes."""
    denoise: DenoiseConfig | None = None
    """Guess hidden tokens of the training examples beside classifying them; null: do not."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, which is then what is evaluated; null: none."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    compile: bool | Literal["auto"] = "auto"
    """torch.compile over the model. auto: on a GPU, for runs of 1,000 steps or more with an attention that it traces
    whole; shorter runs would not win back the compilation. It draws other dropout masks than the plain form."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """auto: on one GPU the whole step (forward, backward, clipping, update) is recorded once for each size of batch and
    replayed, with the same bits; not under fp16, accumulate, or an attention that asks the host. on: an error there."""
    deterministic: bool = False
    """Deterministic algorithms everywhere; with the same GPU, software and world size runs are bit-equal."""
    log_every: Positive = 50
    eval_every: Positive = 500
    checkpoint_every: Positive = 1000
    checkpoint_choice: Literal["best_val", "last"] = "best_val"
    """Which checkpoint the protocol reports; both are tested and written down."""
    test: Literal["both", "chosen"] = "both"
    """chosen: test the reported checkpoint alone, where a test costs minutes."""
    start_from: str | None = None
    """Folder of a run whose tested weights this one begins with (lra/transfer.py); null: random weights."""
    restart: RestartConfig | None = None
    """null: a run that is stuck at chance goes on; the console says so."""


class Expected(Section):
    """The published accuracy that the recipe aims at."""

    accuracy: float = Field(ge=0, le=1)
    source: str


class RunConfig(Section):
    """All that decides a run."""

    task: SerializeAsAny[TaskOptions]
    """Name of the task (`task: listops`) or a mapping with its generator's options."""
    protocol: Literal["google", "nystrom", "fly", "best", "smoke", "own"] = "own"
    """Whose published setting this follows."""
    track: Literal["paper", "sequence", "open"] = "sequence"
    name: str | None = Field(default=None, pattern=NAME_PATTERN)
    """Folder name under runs_folder; null: made from task, protocol, backend and seed."""
    runs_folder: str = "runs"
    seed: int = Field(default=1, ge=0)
    expected: Expected | None = None
    data: DataConfig = DataConfig()
    model: ModelConfig
    attention: AttentionConfig = AttentionConfig()
    train: TrainConfig

    @field_validator("task", mode="before")
    @classmethod
    def _task_options(cls, value: Any) -> Any:
        if isinstance(value, TaskOptions):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise ValueError(f"must be a task's name or a mapping with `name`; tasks: {', '.join(tasks.names())}")
        if value["name"] not in tasks.names():
            raise ValueError(f"must be one of {', '.join(tasks.names())}")
        return tasks.get(value["name"]).options.model_validate(value)

    @field_validator("attention", mode="before")
    @classmethod
    def _attention_shorthand(cls, value: Any) -> Any:
        return {"backend": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        task = tasks.get(self.task.name)
        if self.data.split_rule is not None and self.data.split_rule not in task.split_rules:
            raise ValueError(f"data.split_rule of {task.name} must be one of {', '.join(task.split_rules)}")
        if task.grid is None:
            for field, value, needs in (
                ("data.black_pixels", self.data.black_pixels, "token"),
                ("model.input", self.model.input, "embedding"),
            ):
                if value != needs:
                    raise ValueError(f"{field}={value} is for image tasks; {task.name} has text tokens")
            if self.model.positions == "axial_rotary":
                raise ValueError(
                    f"model.positions=axial_rotary is for image tasks; {task.name} has no rows and columns"
                )
        self._fits_images(task)
        if self.model.key_weights:
            from lra.attention import backend_class

            if not backend_class(self.attention.backend).exact:
                raise ValueError(
                    f"attention={self.attention.backend} has no scores that model.key_weights could add to; "
                    "add model.key_weights=false and data.weigh_kept=false"
                )
        if self.attention.backend == "block_sparse" and self.data.black_pixels != "token":
            raise ValueError(
                "attention=block_sparse keeps block patterns aligned with image rows, so no pixel can be left out; "
                "add data.black_pixels=token"
            )
        if self.train.batch_size % self.train.accumulate:
            raise ValueError("train.accumulate must divide train.batch_size")
        vocab = self.model.vocab_size
        if vocab is not None and vocab < task.vocab_size:
            raise ValueError(f"model.vocab_size must be at least {task.vocab_size} for {task.name}")
        if self.model.num_positions is not None and self.model.num_positions < self.max_length:
            raise ValueError(f"model.num_positions must be at least the sequence length {self.max_length}")
        return self

    def _fits_images(self, task: tasks.Task) -> None:
        """Check the options that change training examples, most of them whole images."""
        data = self.data
        if data.fresh_lengths and not data.fresh:
            raise ValueError("data.fresh_lengths are those of fresh images; add data.fresh=true")
        if data.weigh_kept and not (data.keep_tokens and self.model.key_weights):
            raise ValueError("data.weigh_kept needs data.keep_tokens and model.key_weights=true")
        if data.shuffle_operands and task.shuffle is None:
            raise ValueError(f"data.shuffle_operands means nothing to {task.name}, which has no operators")
        for name in ("dihedral", "mirror", "shift", "fresh", "shuffle_operands"):
            if getattr(data, name) and self.track != "open":
                raise ValueError(f"data.{name} belongs to the open track; set track=open")
        asked = [name for name in ("keep_tokens", "dihedral", "mirror", "shift", "fresh") if getattr(data, name)]
        if not asked:
            return
        if task.grid is None or task.grid[0] != task.grid[1]:
            raise ValueError(f"data.{asked[0]} means nothing to {task.name}, whose examples are no square images")
        if data.fresh and task.fresh is None:
            raise ValueError(f"data.fresh needs a generator, and {task.name} has none")
        if data.black_pixels != "token" or self.max_length != task.max_length:
            raise ValueError(
                f"data.{asked[0]} works on whole images: it needs data.black_pixels=token and no max_length"
            )
        if data.keep_tokens and self.attention.backend == "block_sparse":
            raise ValueError(
                "attention=block_sparse keeps block patterns aligned with image rows, so no pixel can be left out; "
                "add data.keep_tokens=[]"
            )

    @property
    def max_length(self) -> int:
        """Tokens a sequence is cut to."""
        return self.data.max_length or tasks.get(self.task.name).max_length

    @property
    def padded_length(self) -> int:
        """Length that a padding implementation would pad to, without a CLS token."""
        return self.model.num_positions or self.max_length

    @property
    def run_name(self) -> str:
        """Folder name of the run."""
        return self.name or f"{self.task.name}-{self.protocol}-{self.attention.backend}-s{self.seed}"
