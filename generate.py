"""Step 5: write stories with a trained model. A checkpoint file is all it needs.

python generate.py                                          a new story
python generate.py --prompt "Once upon a time, a cat" --num-samples 3
python generate.py --interactive                            you begin, it goes on
"""

import json
import secrets
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer

from model.checkpoint import find_checkpoint, load_model
from model.decoder import Decoder, choose_weights
from model.files import atomic_write, require_file, shown
from model.generation import Sampling, generate
from model.runtime import choose_device
from model.settings import UserError, read_settings, require, run_script

CHECKPOINT: str | None = None  # a file or folder, "best", "latest" or a step; none: best, else latest
CHECKPOINT_DIR = "checkpoints"  # where best, latest and steps are looked for
PROMPT: list[str] = []  # beginnings, one story (or NUM_SAMPLES) for each; an empty one starts a new story
PROMPTS_FILE: str | None = None  # a text file with one beginning a line
NUM_SAMPLES = 1  # stories for each beginning
MAX_TOKENS = 400  # longest continuation; most stories end by themselves before
TEMPERATURE: float = 0.8  # 0 always takes the likeliest token; higher is more surprising
TOP_K = 0  # draw from the k likeliest tokens only; 0 is off
TOP_P: float = 0.95  # draw from the likeliest tokens that together hold this probability; 1 is off
MIN_P: float = 0.0  # drop tokens below this share of the likeliest one's probability; 0 is off
REPETITION_PENALTY: float = 1.0  # above 1 makes tokens that occurred before less likely
SEED: int | None = None  # of the first story, the next has SEED + 1; none: a new one, which is printed
INTERACTIVE = False  # read a beginning, continue it, again and again
OUTPUT: str | None = None  # write the stories to this .jsonl file instead of printing them
DEVICE = "auto"  # auto, cpu, cuda, cuda:1 or mps
DTYPE = "auto"  # of the weights: float32, float16 (auto, where a CPU can) or int8 (CPU only, the fastest for one story)

# of keys and values in memory at once; stories beyond it wait for the next batch
BATCH_BYTES = 2 * 1024**3


def main() -> None:
    settings = read_settings(
        __file__,
        choices={"dtype": ("auto", "float32", "float16", "int8")},
        aliases={
            "model": "checkpoint",
            "start": "prompt",
            "max-new-tokens": "max-tokens",
            "n": "num-samples",
        },
    )
    require(settings.num_samples >= 1, f"--num-samples must be at least 1, not {settings.num_samples}")
    require(settings.max_tokens >= 1, f"--max-tokens must be at least 1, not {settings.max_tokens}")
    sampling = Sampling(
        settings.temperature, settings.top_k, settings.top_p, settings.min_p, settings.repetition_penalty
    )
    require_file(settings.output, "--output")
    ignored = settings.given & {"prompt", "prompts_file", "num_samples", "output"}
    flags = " and ".join("--" + name.replace("_", "-") for name in sorted(ignored))
    alone = not (settings.interactive and ignored)
    require(alone, f"--interactive reads from the keyboard: leave out {flags}")
    prompts = read_prompts(settings)
    path = find_checkpoint(settings.checkpoint_dir, settings.checkpoint, prefer="best")
    device = choose_device(settings.device)
    weights = choose_weights(device, settings.dtype)
    model, tokenizer, checkpoint = load_model(path, device)
    decoder = Decoder(model, weights, graphs=True)
    writer = Writer(decoder, tokenizer, checkpoint["eot_id"], sampling, settings.max_tokens)
    seed = secrets.randbelow(1_000_000) if settings.seed is None else settings.seed
    size = f"{model.count_parameters():,} parameters in {weights}"
    note(f"{shown(path)}: step {checkpoint['step']:,}, {size}; seed {seed}")

    if settings.interactive:
        converse(writer, seed)
        return
    prompts = [prompt for prompt in prompts for _ in range(settings.num_samples)]
    started = time.perf_counter()
    if len(prompts) == 1 and settings.output is None:
        rows = [writer.stream(prompts[0], seed)]
    else:
        rows = writer.write(prompts, seed)
        if settings.output is None:
            print("\n---\n".join(row["prompt"] + row["story"] for row in rows))
    seconds, tokens = time.perf_counter() - started, sum(row["tokens"] for row in rows)
    if settings.output is not None:
        with atomic_write(Path(settings.output)) as temporary:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            temporary.write_text("".join(lines), encoding="utf-8")
        print(f"{len(rows)} stories in {settings.output}")
    cut = sum(row["finish_reason"] == "length" for row in rows)
    unended = f"; {cut} cut at --max-tokens" if cut else ""
    note(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s{unended}")


def note(text: str) -> None:
    """A remark for people, beside the stories on stdout."""
    print(text, file=sys.stderr, flush=True)


def read_prompts(settings: SimpleNamespace) -> list[str]:
    prompts = list(settings.prompt)
    if settings.prompts_file is not None:
        try:
            text = Path(settings.prompts_file).read_text(encoding="utf-8-sig")
            prompts += text.removesuffix("\n").split("\n")
        except FileNotFoundError:
            raise UserError(f"there is no file {settings.prompts_file}") from None
        except UnicodeDecodeError:
            raise UserError(f"{settings.prompts_file} is not UTF-8 text") from None
    # what the command line holds beside UTF-8 arrives as lone surrogates, which no tokenizer takes
    prompts = [prompt.encode(errors="surrogateescape").decode(errors="replace") for prompt in prompts]
    return prompts or [""]


class Writer:
    """A model with its tokenizer and the way to sample: text in, story out."""

    def __init__(
        self, decoder: Decoder, tokenizer: Tokenizer, eot_id: int, sampling: Sampling, max_tokens: int
    ):
        self.decoder, self.tokenizer, self.eot_id = decoder, tokenizer, eot_id
        self.sampling, self.max_tokens = sampling, max_tokens

    def encode(self, prompt: str) -> list[int]:
        """The prompt's ids after the end-of-text token that every story follows."""
        ids = [self.eot_id, *self.tokenizer.encode(prompt, add_special_tokens=False).ids]
        room = self.decoder.config.block_size
        if len(ids) > room:
            note(
                f"note: a beginning of {len(ids):,} tokens exceeds the context of {room}; its last part is read"
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def row(self, prompt: str, ids: list[int], seed: int) -> dict:
        reason = "length" if len(ids) >= self.max_tokens else "end_of_story"
        return {
            "prompt": prompt,
            "story": self.decode(ids),
            "tokens": len(ids),
            "seed": seed,
            "finish_reason": reason,
        }

    def write(self, prompts: list[str], seed: int) -> list[dict]:
        """A story for each prompt, as many at once as BATCH_BYTES of keys and values have room for."""
        from tqdm import tqdm

        config = self.decoder.config
        cache_bytes = 8 * config.n_layer * config.n_head * config.head_dim * config.block_size  # of one story
        at_once = max(1, BATCH_BYTES // cache_bytes)
        rows = []
        with tqdm(total=len(prompts), unit="story", disable=None, delay=2, leave=False) as bar:
            for first in range(0, len(prompts), at_once):
                part = prompts[first : first + at_once]
                seeds = [seed + first + k for k in range(len(part))]
                written: list[list[int]] = [[] for _ in part]
                encoded = [self.encode(prompt) for prompt in part]
                steps = generate(self.decoder, encoded, self.max_tokens, self.eot_id, self.sampling, seeds)
                for position, tokens in enumerate(steps):
                    for ids, token in zip(written, tokens, strict=True):
                        if token is not None:
                            ids.append(token)
                    bar.set_postfix_str(f"{position + 1} tokens", refresh=position % 16 == 0)
                rows += [self.row(*facts) for facts in zip(part, written, seeds, strict=True)]
                bar.update(len(part))
        return rows

    def stream(self, prompt: str, seed: int) -> dict:
        """Print one story as it is written, in whole characters."""
        print(prompt, end="", flush=True)
        ids: list[int] = []
        pending: list[int] = []
        encoded = [self.encode(prompt)]
        for (token,) in generate(self.decoder, encoded, self.max_tokens, self.eot_id, self.sampling, [seed]):
            if token is None:
                continue
            ids.append(token)
            pending.append(token)
            text = self.decode(pending)
            # a character of several bytes may lie across tokens: it is shown when it is whole
            if not text.endswith("\ufffd") or len(pending) > 8:
                print(text, end="", flush=True)
                pending = []
        print(self.decode(pending), flush=True)
        return self.row(prompt, ids, seed)


def converse(writer: Writer, seed: int) -> None:
    """Continue what the user types until an end of file or Ctrl-C."""
    sys.stdin.reconfigure(errors="replace")
    note("Type the beginning of a story and press Enter (empty: a new story). Ctrl-D or Ctrl-C leaves.")
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
            writer.stream(prompt, seed)
        except (EOFError, KeyboardInterrupt):
            note("")
            return
        seed += 1


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run_script(main)
