"""Every key of a training run, its default and its range.

Names, and most defaults, are nanoGPT's where the meaning is the same, so that its config files
mean here what they mean there. `python train.py --help` prints this table.
"""

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields

from nanolm.layers import ModelConfig, require_at_least, require_choice, require_fraction
from nanolm.optim import OPTIMIZERS, SCHEDULES, learning_rate
from nanolm.runs.processes import BACKENDS
from nanolm.tasks.scores import TEXT_SCORES
from nanolm.tasks.table import TASKS


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ModelConfig):
    """The keys of a model, and those of its training."""

    vocab_size: int | None = None  # set by the tokenizer
    # the run
    out_dir: str | None = None  # folder of the run; None: out/<name of the config file>
    task: str = "causal"  # what to train for
    init_from: str = "scratch"  # scratch | resume | auto | gpt2[-medium...] | FOLDER | OWNER/NAME
    pretrained: str | None = None  # auto, with nothing to resume: begin with this model's weights
    overwrite: bool = False  # let scratch replace the run that is in out_dir
    eval_interval: int = 2000  # updates between evaluations
    eval_iters: int = 200  # batches per evaluation of a split; 0: all of val, as many of train
    eval_answers: int = 100  # completion, seq2seq: texts that are answered at an evaluation
    eval_only: bool = False  # stop after the first evaluation
    log_interval: int = 1  # updates between lines on the console
    sample_tokens: int = 200  # length of the sample printed at each evaluation; 0: none
    always_save_checkpoint: bool = True  # False: keep only the newest step file, beside best.pt
    keep_checkpoints: int = 2  # step files that are kept
    best_by: str = "loss"  # the score of val that chooses best.pt: loss, or one of the task's
    wandb_log: bool = False  # also log to Weights & Biases
    wandb_project: str = "nanolm"  # its project
    wandb_run_name: str | None = None  # its run; None: the name of out_dir
    # data
    dataset: str = "openwebtext"  # folder in data/
    batch_size: int = 12  # sequences per micro-batch
    gradient_accumulation_steps: int = 40  # micro-batches per update
    batch_tokens: int = 0  # seq2seq: a micro-batch has about so many, not batch_size examples
    pack: bool = True  # completion: several short examples share a sequence
    begin_id: int | None = None  # causal: the token a text begins after (set by the dataset)
    chat: bool = False  # completion, seq2seq: examples are conversations (set by the dataset)
    mask_fraction: float = 0.15  # masked: of the tokens, how many are hidden and guessed
    seed: int = 1337  # of weights, data order and dropout
    # optimizer
    optimizer: str = "adamw"  # what turns gradients into steps
    learning_rate: float = 6e-4  # lr, at its peak
    max_iters: int = 600000  # updates: there are no epochs to count
    weight_decay: float = 1e-1  # of matrices
    beta1: float = 0.9  # decay of the running mean of gradients: the momentum
    beta2: float = 0.95  # decay of the running mean of their squares
    grad_clip: float = 1.0  # gradients longer than this are scaled down; 0: none
    decay_lr: bool = True  # False: the same rate at every update
    schedule: str = "cosine"  # how the rate falls
    warmup_iters: int = 2000  # updates of linear warm-up
    lr_decay_iters: int | None = None  # update at which min_lr is reached; None: max_iters
    cooldown_iters: int | None = None  # trapezoid: length of the slope; None: lr_decay_iters / 5
    min_lr: float = 6e-5  # rate at the end
    # machine
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16: precision of matrix products
    compile: bool | str = "auto"  # auto | True | False
    recompute: bool = False  # keep less of each block for the backward pass: memory for time
    shard: bool = False  # each of several processes keeps only a part of the weights
    tensor_parallel: int = 1  # so many processes split each matrix between them
    backend: str = "auto"  # how several processes talk to each other

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, 1, "eval_interval log_interval keep_checkpoints batch_size")
        require_at_least(self, 1, "gradient_accumulation_steps lr_decay_iters cooldown_iters")
        require_at_least(self, 1, "tensor_parallel")
        require_at_least(self, 0, "eval_iters sample_tokens seed max_iters warmup_iters")
        require_at_least(self, 0, "eval_answers batch_tokens")
        require_at_least(self, 0, "weight_decay grad_clip min_lr")
        if not 0 < self.learning_rate <= 1e30:  # float32 holds no more
            raise ValueError(f"learning_rate={self.learning_rate}: must be above 0, at most 1e30")
        if self.decay_lr and self.min_lr > self.learning_rate:
            raise ValueError(
                f"min_lr={self.min_lr}: must be at most learning_rate={self.learning_rate}; give "
                "both, or --decay_lr=false for a rate that stays"
            )
        require_fraction(self, "beta1 beta2 mask_fraction")
        if self.batch_tokens and self.task != "seq2seq":
            raise ValueError(
                f"batch_tokens={self.batch_tokens}: only seq2seq fills its batches so; give the "
                "others a batch_size"
            )
        require_choice("best_by", self.best_by, ("loss", *TASKS[self.task].best_by))
        if self.best_by in TEXT_SCORES and not self.eval_answers:
            raise ValueError(f"best_by={self.best_by!r}: needs eval_answers of at least 1")
        if self.pretrained and self.init_from not in ("auto", "resume"):
            raise ValueError(
                f"pretrained={self.pretrained!r} goes with --init_from=auto, and init_from is "
                f"{self.init_from!r}"
            )

    @staticmethod
    def choices() -> dict[str, Collection[str]]:
        """What the keys that name something may be."""
        names = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES, "task": TASKS}
        return {**ModelConfig.choices(), **names, "backend": ("auto", *BACKENDS)}

    @property
    def tokens_per_update(self) -> int:
        tokens = self.batch_tokens or self.batch_size * self.block_size
        return self.gradient_accumulation_steps * tokens

    @property
    def blind_loss(self) -> float:
        """The loss, in nats, of one that finds all tokens, or all labels, equally likely."""
        return math.log(len(self.labels) or self.vocab_size)

    def score_of(self, scores: dict[str, float]) -> float:
        """The number by which an evaluation is the best one: the lowest."""
        return scores["val_loss"] if self.best_by == "loss" else -scores[self.best_by]

    def model_config(self) -> ModelConfig:
        """The model's part of the keys."""
        return model_config_of(asdict(self))

    def rate(self, step: int) -> float:
        """The learning rate of an update."""
        if not self.decay_lr:
            return self.learning_rate
        decay_iters = self.lr_decay_iters or max(1, self.max_iters)
        return learning_rate(
            step,
            schedule=self.schedule,
            peak=self.learning_rate,
            floor=self.min_lr,
            warmup_iters=self.warmup_iters,
            decay_iters=decay_iters,
            cooldown_iters=self.cooldown_iters or max(1, decay_iters // 5),
        )


MODEL_KEYS = tuple(field.name for field in fields(ModelConfig))
# What two models must share to share their weights.
SHAPE_KEYS = tuple(key for key in MODEL_KEYS if key not in ("dropout", "label_smoothing"))
HEAD_KEYS = ("head", "labels")  # those of its shape that another task changes
DERIVED_KEYS = ("n_hidden", "head_size", "n_kv_head")  # from n_embd and n_head, unless given


def model_config_of(keys: dict) -> ModelConfig:
    """The model's part of a config; keys that are younger than it have their defaults."""
    return ModelConfig(**{key: keys[key] for key in MODEL_KEYS if key in keys})
