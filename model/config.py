"""The shape of a model, and named presets: a shape with its training recipe."""

from dataclasses import dataclass, field, fields, replace

from model.settings import UserError, require

BLOCK_FAMILIES = ("modern", "gpt2")
OPTIMIZERS = ("muon", "adamw")
SCHEDULES = ("linear", "cosine")


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. Raises UserError where the numbers do not fit together."""

    vocab_size: int = 10_000
    block_size: int = 256  # context length, in tokens
    n_layer: int = 8
    n_head: int = 8
    n_embd: int = 256
    dropout: float = 0.0
    tie_weights: bool = True  # the output head is the token embedding
    blocks: str = "modern"  # "modern" is Qwen3's dense architecture, "gpt2" is GPT-2's
    n_kv_head: int | None = None  # key-value heads, each for n_head / n_kv_head queries; None: n_head
    head_size: int | None = None  # width of a head; None: n_embd / n_head
    n_inner: int | None = None  # width of the feed-forward layer; None: see n_hidden
    rope_base: float = 10_000.0  # longest wavelength of rotary positions, over 2 pi

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "kv_heads", "n_hidden"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        require(
            self.head_size is not None or self.n_embd % self.n_head == 0,
            f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: each head takes an equal part",
        )
        require(
            self.n_head % self.kv_heads == 0,
            f"n_head {self.n_head} is not divisible by n_kv_head {self.kv_heads}",
        )
        require(self.blocks in BLOCK_FAMILIES, f"blocks is modern or gpt2, not {self.blocks!r}")
        modern_only = self.n_kv_head is None and self.head_size is None
        require(self.blocks == "modern" or modern_only, "n_kv_head and head_size are for modern blocks")
        require(
            self.blocks == "gpt2" or self.head_dim % 2 == 0,
            f"modern blocks need an even head size; n_embd {self.n_embd} / n_head {self.n_head} is {self.head_dim}",
        )
        require(self.head_dim >= 1, f"head_size must be at least 1, not {self.head_size}")
        require(self.rope_base > 0, f"rope_base must be above 0, not {self.rope_base:g}")
        require(0 <= self.dropout < 1, f"dropout must be at least 0 and below 1, not {self.dropout}")

    @property
    def can_hold_bigrams(self) -> bool:
        """Whether the next token's logits can be any function of this token's embedding: see model/bigrams.py."""
        return self.blocks == "modern" and not self.tie_weights and self.n_embd > 2

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head if self.head_size is None else self.head_size

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def n_hidden(self) -> int:
        """Width of the feed-forward layer: 4 n_embd, or for SwiGLU's three matrices 8/3, in steps of 64."""
        if self.n_inner is not None:
            return self.n_inner
        return 4 * self.n_embd if self.blocks == "gpt2" else -(-8 * self.n_embd // (3 * 64)) * 64


CONFIG_FIELDS = tuple(f.name for f in fields(GPTConfig))


@dataclass(frozen=True)
class Recipe:
    """How a preset is trained. Learning rates are peaks; tokens are per optimizer step, over all processes.

    The defaults are the one rule for all shapes and budgets: Muon's updates and AdamW's have the same size in
    matrices of any shape (Liu et al. 2025), so that a learning rate carries over; batches are as small as the
    hardware stays busy with; decay is a part of the run, and warm-up too short to matter to the shortest.
    What else was tried is in benchmarks/RESULTS.md.
    """

    batch_tokens: int = 65_536
    cpu_batch_tokens: int | None = 2_048  # on a CPU, which takes a second for some thousand tokens
    max_steps: int = 20_000
    max_minutes: float | None = None
    optimizer: str = "muon"
    learning_rate: float = 6e-3
    weight_decay: float = 0.1
    warmup_steps: int = 10
    schedule: str = "linear"
    decay_fraction: float = 0.6  # the last part of the run, over which the learning rate falls
    final_learning_rate: float = 0.0  # as a fraction of the peak
    grad_clip: float = 1.0
    mask_stories: bool = True  # attention stays within a story
    bigram_start: bool = True  # a new model begins as a bigram model of the stories, if its shape allows that
    eval_interval: int = 250
    cpu_eval_interval: int | None = 400

    def __post_init__(self):
        for name in ("batch_tokens", "max_steps", "eval_interval"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("weight_decay", "warmup_steps", "grad_clip", "final_learning_rate"):
            require(getattr(self, name) >= 0, f"{name} must be 0 or more, not {getattr(self, name)}")
        require(self.learning_rate > 0, f"learning_rate must be above 0, not {self.learning_rate}")
        require(
            0 < self.decay_fraction <= 1,
            f"decay_fraction is above 0 and at most 1, not {self.decay_fraction}",
        )
        require(
            self.max_minutes is None or self.max_minutes > 0,
            f"max_minutes must be above 0, not {self.max_minutes}",
        )
        require(self.optimizer in OPTIMIZERS, f"optimizer is muon or adamw, not {self.optimizer!r}")
        require(self.schedule in SCHEDULES, f"schedule is linear or cosine, not {self.schedule!r}")

    def progress(self, step: int, seconds: float) -> float:
        """How much of a run is done after so many steps and seconds in them; 1 and more is the end."""
        by_time = seconds / (60 * self.max_minutes) if self.max_minutes else 0.0
        return max(step / self.max_steps, by_time)


RECIPE_FIELDS = tuple(f.name for f in fields(Recipe) if not f.name.startswith("cpu_"))

ADAMW = Recipe(
    optimizer="adamw",
    learning_rate=1e-3,
    warmup_steps=100,
    schedule="cosine",
    decay_fraction=1.0,
    final_learning_rate=0.1,
    mask_stories=False,
    bigram_start=False,
)

# Where another optimizer is asked for than the preset's, the learning rate is that optimizer's own.
LEARNING_RATES = {recipe.optimizer: recipe.learning_rate for recipe in (Recipe(), ADAMW)}


@dataclass(frozen=True)
class Preset:
    config: GPTConfig  # vocab_size is the intended one; training takes the tokenizer's
    recipe: Recipe = field(default_factory=Recipe)
    tokenizer: str = "bpe"


def _adamw(**changes: object) -> Recipe:
    return replace(ADAMW, **{"cpu_batch_tokens": None, "cpu_eval_interval": None, **changes})


GPT2_SMALL = {
    "vocab_size": 50_257,
    "n_layer": 6,
    "n_head": 6,
    "n_embd": 384,
    "dropout": 0.1,
    "blocks": "gpt2",
}
SLM = _adamw(batch_tokens=32 * 32 * 128, learning_rate=1e-4, warmup_steps=1_000)

PRESETS = {
    # 4 heads learn more from each token than 8, and faster; with a head of its own it can begin as a bigram model
    "stories-9m": Preset(GPTConfig(n_head=4, tie_weights=False)),
    "tinystories-gpt": Preset(
        GPTConfig(blocks="gpt2"), _adamw(cpu_batch_tokens=2_048, cpu_eval_interval=400)
    ),
    "slm-30m": Preset(GPTConfig(block_size=128, **GPT2_SMALL), SLM, "gpt2"),
    "slm-50m": Preset(GPTConfig(block_size=128, tie_weights=False, **GPT2_SMALL), SLM, "gpt2"),
    "tinystories-33m": Preset(
        GPTConfig(block_size=512, **GPT2_SMALL),
        # 80 windows of 512 tokens, 16 times a step; 20 epochs of 470 million tokens
        _adamw(batch_tokens=80 * 16 * 512, max_steps=14_300, learning_rate=5e-4, grad_clip=0.5),
        "gpt2",
    ),
    "stories-15m": Preset(GPTConfig(vocab_size=32_000, n_layer=6, n_head=6, n_embd=288)),
    "stories-42m": Preset(GPTConfig(vocab_size=32_000, block_size=1_024, n_embd=512)),
    "stories-110m": Preset(
        GPTConfig(vocab_size=32_000, block_size=1_024, n_layer=12, n_head=12, n_embd=768),
        Recipe(batch_tokens=131_072, learning_rate=4e-3),
    ),
    "quickstart": Preset(
        GPTConfig(vocab_size=2_048, n_layer=4, n_head=4, n_embd=192, tie_weights=False),
        Recipe(
            batch_tokens=2_048,
            cpu_batch_tokens=None,
            max_steps=2_400,
            max_minutes=3.5,
            eval_interval=200,
            cpu_eval_interval=None,
        ),
    ),
}


def find_preset(name: str) -> Preset:
    """The preset of that name. Raises UserError with the known names."""
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
