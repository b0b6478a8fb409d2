"""Model shapes, and named presets: a shape with its training recipe."""

import math
from dataclasses import dataclass, field, fields, replace

from model.errors import require
from model.settings import require_within

BLOCK_FAMILIES = ("modern", "gpt2")
OPTIMIZERS = ("muon", "adamw")
SCHEDULES = ("linear", "cosine")
NORM_EPS = {"modern": 1e-6, "gpt2": 1e-5}  # of RMSNorm and LayerNorm

# A CPU trains on few tokens per second. Then small steps learn most, and the shorter the run, the smaller: the noise
# that a batch has to average out grows as the loss falls (McCandlish et al. 2018).
CPU_STEPS = {"batch_tokens": 4_096, "eval_interval": 200}
SHORT_MINUTES = 4  # runs of less than this take half of it
# And in the same time, half of the blocks learn more than all; the others join late (progressive stacking, Gong et al.
# 2019). The loss of part of the vocabulary takes less time, too (model/sampled_softmax.py). Not measured on a GPU.
CPU_SHORTCUTS = {"grow_at": 0.8, "sampled_softmax": True}

# Of few stories, small steps learn most on any device: an epoch has at least so many, each of 2,048 tokens or more.
STEPS_PER_EPOCH = 200


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. Raises UserError if the numbers do not fit together."""

    vocab_size: int = 10_000
    block_size: int = 256  # context length, in tokens
    n_layer: int = 8
    n_head: int = 8
    n_embd: int = 256
    dropout: float = 0.0  # of embeddings and of what blocks add to them; see attention_dropout
    tie_weights: bool = True  # the output head is the token embedding
    blocks: str = "modern"  # "modern" is Qwen3's dense architecture, "gpt2" is GPT-2's
    n_kv_head: int | None = None  # key-value heads, each for n_head / n_kv_head query heads; None: n_head
    head_size: int | None = None  # width of a head; None: n_embd / n_head
    n_inner: int | None = None  # width of the feed-forward layer; None: see n_hidden
    rope_base: float = 10_000.0  # base of the rotary frequencies, rope_base ** (-2i / D)

    def __post_init__(self):
        counts = "vocab_size block_size n_head n_embd n_kv_head head_size n_inner".split()
        require_within(self, **dict.fromkeys(counts, "[1, 1e9]"), n_layer="[1, 1e4]")
        require_within(self, rope_base="(0, inf)", dropout="[0, 1)")
        require(
            self.head_size is not None or self.n_embd % self.n_head == 0,
            f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: all heads have the same size",
        )
        require(
            self.n_head % self.kv_heads == 0,
            f"n_head {self.n_head} is not divisible by n_kv_head {self.kv_heads}",
        )
        require(self.blocks in BLOCK_FAMILIES, f"blocks must be modern or gpt2, not {self.blocks!r}")
        modern_only = self.n_kv_head is not None or self.head_size is not None
        require(self.blocks == "modern" or not modern_only, "n_kv_head and head_size need modern blocks")
        origin = f"n_embd {self.n_embd} / n_head {self.n_head}" if self.head_size is None else "head_size"
        require(
            self.blocks == "gpt2" or self.head_dim % 2 == 0,
            f"modern blocks need an even head size; {origin} is {self.head_dim}",
        )

    @property
    def can_hold_bigrams(self) -> bool:
        """Whether the weights can be initialised as a bigram model: see model/bigrams.py."""
        return self.blocks == "modern" and not self.tie_weights and self.n_embd > 2

    @property
    def attention_dropout(self) -> float:
        """Of the attention weights. In modern blocks none: it takes a quarter of a step, and gains little."""
        return self.dropout if self.blocks == "gpt2" else 0.0

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head if self.head_size is None else self.head_size

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def n_hidden(self) -> int:
        """Width of the feed-forward layer: 4 n_embd; with SwiGLU, which has three matrices instead of two, 8/3 n_embd,
        rounded up to a multiple of 64."""
        if self.n_inner is not None:
            return self.n_inner
        return 4 * self.n_embd if self.blocks == "gpt2" else -(-8 * self.n_embd // (3 * 64)) * 64


CONFIG_FIELDS = tuple(f.name for f in fields(GPTConfig))


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    The defaults suit most shapes and budgets: Muon's updates have the same size as AdamW's in matrices of any
    shape (Liu et al. 2025), so a learning rate carries over; batches are as small as keeps the hardware busy;
    decay is a fraction of the run, and warm-up is short enough for the shortest run.
    For what else was tried, see benchmarks/RESULTS.md.
    """

    batch_tokens: int = 65_536  # per optimizer step, over all processes
    max_steps: int | None = 20_000  # the run ends at the first of this limit and the next two
    max_minutes: float | None = None  # of training steps
    max_epochs: float | None = 8.0  # passes over the training stories; a run's max_steps is no more
    optimizer: str = "muon"
    learning_rate: float = 6e-3  # at its peak
    weight_decay: float = 0.1  # in new Muon runs on few stories, more: see weight_decay_for()
    warmup_steps: int = 10
    schedule: str = "linear"
    decay_fraction: float = 0.6  # final fraction of the run, over which the learning rate decays
    final_learning_rate: float = 0.0  # as a fraction of the peak
    grad_clip: float = 1.0
    mask_stories: bool = True  # attend within a story only
    bigram_start: bool = True  # initialise a new model as a bigram model of the stories, if its shape allows
    grow_at: float = 0.0  # when the second half of the blocks joins, as a fraction of the run; 0: at once
    sampled_softmax: bool = False  # compute the training loss from part of the vocabulary
    eval_interval: int = 1_000

    def __post_init__(self):
        require_within(self, batch_tokens="[1, 1e12]", max_steps="[1, inf)", eval_interval="[1, inf)")
        require_within(self, learning_rate="(0, inf)", final_learning_rate="[0, 1]", warmup_steps="[0, inf)")
        require_within(self, max_minutes="(0, 1e9]", max_epochs="(0, 1e9]")
        require_within(self, weight_decay="[0, inf)", grad_clip="[0, inf)")
        require_within(self, decay_fraction="(0, 1]", grow_at="[0, 1)")
        limits = self.max_steps, self.max_minutes, self.max_epochs
        require(any(limits), "a run needs an end: set max_steps, max_minutes or max_epochs")
        require(self.optimizer in OPTIMIZERS, f"optimizer must be muon or adamw, not {self.optimizer!r}")
        require(self.schedule in SCHEDULES, f"schedule must be linear or cosine, not {self.schedule!r}")

    def windows_per_step(self, block_size: int) -> int:
        """Whole windows of block_size tokens per step, at least one."""
        return max(1, self.batch_tokens // block_size)

    def tokens_per_step(self, block_size: int) -> int:
        return self.windows_per_step(block_size) * block_size

    def progress(self, step: int, seconds: float) -> float:
        """Fraction of the run done after this many steps and seconds in them; at 1 or more it is finished."""
        by_steps = step / self.max_steps if self.max_steps else 0.0
        by_time = seconds / (60 * self.max_minutes) if self.max_minutes else 0.0
        return max(by_steps, by_time)

    def depth(self, progress: float, n_layer: int) -> int:
        """How many of the blocks train at this progress: half of them until grow_at, then all."""
        return n_layer if progress >= self.grow_at else -(-n_layer // 2)

    @property
    def turning_point(self) -> float:
        """The progress from which a longer run would differ: its learning rate would not fall yet, nor depth grow."""
        return min(1 - self.decay_fraction, self.grow_at or 1)


def weight_decay_for(tokens: int) -> float:
    """The weight decay of Muon's recipe for so many training tokens: the fewer there are, the more often each is read.

    The best time in which weights forget is a number of epochs (for AdamW: Wang and Aitchison 2024). Here it is one:
    in an epoch of 2,048-token steps at a learning rate of 0.006, they shrink to 1/e. Larger steps wanted no more decay
    than that (benchmarks/RESULTS.md), and below 70,000 tokens nothing was measured.
    """
    return min(5.0, max(Recipe.weight_decay, 2_048 / (0.006 * tokens)))


def batch_for(tokens: int) -> int:
    """The most tokens per step for so many training tokens: a power of two (benchmarks/RESULTS.md)."""
    return 2 ** max(11, int(math.log2(tokens / STEPS_PER_EPOCH)))


RECIPE_FIELDS = tuple(f.name for f in fields(Recipe))

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

# The default learning rate if another optimizer than the preset's is chosen
LEARNING_RATES = {recipe.optimizer: recipe.learning_rate for recipe in (Recipe(), ADAMW)}


@dataclass(frozen=True)
class Preset:
    config: GPTConfig  # vocab_size is the intended one; training uses the tokenizer's
    recipe: Recipe = field(default_factory=Recipe)
    # what the recipe has instead on a CPU
    cpu: dict[str, object] = field(default_factory=lambda: CPU_STEPS | CPU_SHORTCUTS)

    def recipe_on(self, device_type: str, tokens: int, **limits: int | float | None) -> Recipe:
        """The recipe on a type of device, for so many training tokens and a run with these limits. With few tokens,
        and on a CPU in few minutes, it takes smaller steps."""
        own = self.cpu if device_type == "cpu" else {}
        recipe = replace(self.recipe, **limits, **own)
        batch = recipe.batch_tokens
        if "batch_tokens" in own and recipe.max_minutes and recipe.max_minutes < SHORT_MINUTES:
            batch //= 2
            recipe = replace(recipe, eval_interval=2 * recipe.eval_interval)
        if self.cpu:  # not a published recipe, which is the same everywhere
            batch = min(batch, batch_for(tokens))
        return replace(recipe, batch_tokens=batch)


SLM_SHAPE = {
    "vocab_size": 50_257,
    "n_layer": 6,
    "n_head": 6,
    "n_embd": 384,
    "dropout": 0.1,
    "blocks": "gpt2",
}
PUBLISHED = replace(ADAMW, max_epochs=None, eval_interval=250)
SLM = replace(PUBLISHED, batch_tokens=32 * 32 * 128, learning_rate=1e-4, warmup_steps=1_000)

PRESETS = {
    # 4 heads learn more per token than 8, and run faster; an untied output head allows the bigram start
    "stories-9m": Preset(GPTConfig(n_head=4, tie_weights=False)),
    "tinystories-gpt": Preset(GPTConfig(blocks="gpt2"), ADAMW, CPU_STEPS),
    "slm-30m": Preset(GPTConfig(block_size=128, **SLM_SHAPE), SLM, cpu={}),  # the same on any device
    "slm-50m": Preset(GPTConfig(block_size=128, tie_weights=False, **SLM_SHAPE), SLM, cpu={}),
    "tinystories-33m": Preset(
        GPTConfig(block_size=512, **SLM_SHAPE),
        # 80 windows of 512 tokens, 16 times per step; 20 epochs of 470 million tokens
        replace(PUBLISHED, batch_tokens=80 * 16 * 512, max_steps=14_300, learning_rate=5e-4, grad_clip=0.5),
        cpu={},
    ),
    "stories-15m": Preset(GPTConfig(vocab_size=32_000, n_layer=6, n_head=6, n_embd=288)),
    "stories-42m": Preset(GPTConfig(vocab_size=32_000, block_size=1_024, n_embd=512)),
    "stories-110m": Preset(
        GPTConfig(vocab_size=32_000, block_size=1_024, n_layer=12, n_head=12, n_embd=768),
        # the learning rate is a guess, lower than measured for smaller models
        Recipe(batch_tokens=131_072, learning_rate=4e-3, eval_interval=250),
    ),
    "quickstart": Preset(
        GPTConfig(vocab_size=2_048, n_layer=4, n_head=4, n_embd=192, tie_weights=False),
        Recipe(batch_tokens=2_048, max_steps=2_400, max_minutes=3.5, eval_interval=200),
        CPU_SHORTCUTS,
    ),
}
