"""Step 5: write stories with a trained model. A checkpoint file, or a Hugging Face model, is all it needs.

python generate.py                                          a new story
python generate.py --prompt "Once upon a time, a cat" --num-samples 3
python generate.py --interactive                            you start a story, the model continues it
python generate.py --checkpoint openai-community/gpt2       with a GPT-2 or Qwen3 model from the hub, or a folder
"""

import contextlib
import importlib
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from model.script import run_script  # before torch: see there

# isort: split
from tokenizers import Tokenizer
from tqdm import tqdm

from model import kernels
from model.candidates import files_of, find_candidate
from model.checkpoint import load_model
from model.decoder import Decoder, choose_weights
from model.errors import note, require
from model.files import count_text, file_to_write, read_text, shown, write_text
from model.generation import context_start, generate
from model.huggingface import load_pretrained_model
from model.runtime import choose_device
from model.sampling import Sampling
from model.settings import flag_name, read_settings, require_seed, require_within
from model.tokenizer import readable

CHECKPOINT: str | None = None  # a file, folder, step, best, latest or Hugging Face name; None: best, latest
CHECKPOINT_DIR: str = "checkpoints"  # where to look for best, latest and steps
PROMPT: list[str] = []  # starts of stories, each continued NUM_SAMPLES times; FILE:name: a whole file's text
PROMPTS_FILE: str | None = None  # a text file with one prompt per line; empty lines are skipped
NUM_SAMPLES: int = 1  # stories per prompt
MAX_TOKENS: int = 400  # maximum length of a continuation; most stories end earlier by themselves
TEMPERATURE: float = 0.8  # 0 is greedy; higher is more surprising
TOP_K: int = 0  # sample from the k most likely tokens only; 0 is off
TOP_P: float = 0.95  # sample from the most likely tokens that together have this probability; 1 is off
MIN_P: float = 0.0  # drop tokens below this fraction of the highest probability; 0 is off
REPETITION_PENALTY: float = 1.0  # above 1 makes tokens that have already occurred less likely
SEED: int | None = None  # of the first story; the next uses SEED + 1; None: a random seed, which is printed
INTERACTIVE: bool = False  # read prompts from the keyboard and continue each
OUTPUT: str | None = None  # write the stories to this .jsonl file instead of printing them
DEVICE: str = "auto"  # auto, cpu, cuda, cuda:1 or mps
DTYPE: str = "auto"  # weights: float32, float16 (GPUs) or int8 (CPUs with a C compiler, where auto takes it)

# Earlier tokens on which the text of the next ones may depend
DECODED_WITH = 8
# What some tokenizers call the token of a single byte, whose text may depend on the next one
BYTE = re.compile("<0x[0-9A-F]{2}>")
# Limit on the KV cache; further stories wait for the next batch
CACHE_BYTES = 2 * 1024**3
# A Hugging Face model's context, in tokens, unless the prompts need more: some have tens of thousands
PRETRAINED_CONTEXT = 4_096
# Tokens by which prompts may differ in a batch, besides twofold
SIMILAR = 64


def main() -> None:
    settings = read_settings(
        __file__,
        choices={"dtype": ("auto", "float32", "float16", "int8")},
        aliases={
            "model": "checkpoint",
            "start": "prompt",
            "max-new-tokens": "max-tokens",
            "n": "num-samples",
            "temp": "temperature",
            "out-dir": "checkpoint-dir",
        },
    )
    require_within(settings, num_samples="[1, 1000000]", max_tokens="[1, 100000]")
    sampling = Sampling(
        settings.temperature, settings.top_k, settings.top_p, settings.min_p, settings.repetition_penalty
    )
    ignored = settings.given & {"prompt", "prompts_file", "num_samples", "output"}
    require(
        not (settings.interactive and ignored),
        f"--interactive reads from the keyboard: leave out {' and '.join(map(flag_name, sorted(ignored)))}",
    )
    prompts = read_prompts(settings)
    found = find_candidate(settings.checkpoint_dir, settings.checkpoint, prefer="best")
    files = [os.path.expanduser(name) for name in filter(None, map(prompt_file, settings.prompt))]
    read = [*files_of(found), *files, *filter(None, [settings.prompts_file])]
    settings.output = file_to_write(settings.output, "--output", read)
    if settings.output and settings.output.exists():
        note(f"{shown(settings.output)} will be replaced")
    seed = secrets.randbelow(1_000_000) if settings.seed is None else settings.seed
    require_seed(seed)
    count = len(prompts) * settings.num_samples
    require(seed + count <= 2**63, f"--seed {seed} is too large for {count:,} stories")
    writer, about = load_writer(found, settings, sampling, prompts)
    remark(f"{shown(found)}: {about}; seed {seed}")
    if settings.interactive:
        converse(writer, seed)
    else:
        prompts = [prompt for prompt in prompts for _ in range(settings.num_samples)]
        write_stories(writer, prompts, seed, settings.output)


def remark(text: str) -> None:
    """Print a remark to stderr; stdout is for the stories."""
    print(text, file=sys.stderr, flush=True)


def read_prompts(settings: SimpleNamespace) -> list[str]:
    prompts = []
    for word in settings.prompt:
        if (name := prompt_file(word)) is not None:
            word = read_text(name).rstrip()
            require(word, f"{name} holds no prompt")
        prompts.append(word)
    if settings.prompts_file is not None:
        lines = [line for line in read_text(settings.prompts_file).split("\n") if line.strip()]
        require(lines, f"{settings.prompts_file} holds no prompts")
        prompts += lines
    return [as_prompt(prompt) for prompt in prompts] or [""]


def prompt_file(word: str) -> str | None:
    """The name in a prompt FILE:name, whose text is to be the prompt; None if it is a text itself."""
    return word.removeprefix("FILE:") if word.startswith("FILE:") else None


def as_prompt(text: str) -> str:
    """Words begin with their space: after one, the model would have to write the middle of a word."""
    return readable(text).rstrip(" \r")


def load_writer(
    found: str | Path, settings: SimpleNamespace, sampling: Sampling, prompts: list[str]
) -> tuple["Writer", str]:
    """A Writer with the model of a checkpoint file or a Hugging Face folder or name, and what it is, in words."""
    device = choose_device(settings.device)
    weights = choose_weights(device, settings.dtype)
    if isinstance(found, Path):
        model, tokenizer, checkpoint = load_model(found, device)
        eot_id, step = checkpoint["eot_id"], f"step {checkpoint['step']:,}, "
    else:
        longest = max(len(prompt.encode()) for prompt in prompts) + 1  # tokens, at most
        context = max(PRETRAINED_CONTEXT, longest + settings.max_tokens)
        (model, tokenizer, eot_id), step = load_pretrained_model(found, device, context), ""
    about = f"{step}{model.count_parameters():,} parameters in {weights}"
    if device.type == "cpu" and (reason := kernels.load().shortcoming):
        about += f" (slower than it could be: {reason})"
    decoder = Decoder(model, weights, graphs=True)
    return Writer(decoder, tokenizer, eot_id, sampling, settings.max_tokens), about


def write_stories(writer: "Writer", prompts: list[str], seed: int, output: Path | None) -> None:
    """Print a story for each prompt, or write them to a .jsonl file. Ctrl-C keeps those that have ended."""
    by_place: dict[int, dict] = {}
    started, stopped = time.perf_counter(), False
    if len(prompts) == 1 and output is None:
        by_place[0] = writer.stream(prompts[0], seed)
    else:
        try:
            writer.write(prompts, seed, by_place)
        except KeyboardInterrupt:
            stopped = True
    rows = [by_place[place] for place in sorted(by_place)]
    if output is None and rows and len(prompts) > 1:
        print("\n---\n".join(row["prompt"] + row["story"] for row in rows))
    seconds, tokens = time.perf_counter() - started, sum(row["tokens"] for row in rows)
    if output is not None and rows:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        try:
            write_text(output, lines)
        except OSError:
            print(lines, end="")  # rather than lose them
            raise
        print(f"wrote {count_text(len(rows), 'story', 'stories')} to {shown(output)}")
    if stopped:
        remark(f"stopped: {len(rows):,} of {len(prompts):,} stories are complete")
        sys.exit(130)
    cut = sum(row["finish_reason"] == "length" for row in rows)
    unended = f"; {cut} cut at --max-tokens" if cut else ""
    remark(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s{unended}")


class Writer:
    """A model with its tokenizer and sampling settings: text in, story out."""

    def __init__(
        self, decoder: Decoder, tokenizer: Tokenizer, eot_id: int, sampling: Sampling, max_tokens: int
    ):
        self.decoder, self.tokenizer, self.eot_id = decoder, tokenizer, eot_id
        self.sampling, self.max_tokens = sampling, max_tokens

    def encode(self, prompt: str) -> list[int]:
        """The prompt's ids, preceded by the end-of-text token that comes before every story."""
        ids = [self.eot_id, *self.tokenizer.encode(prompt, add_special_tokens=False).ids]
        block_size = self.decoder.config.block_size
        if len(ids) > block_size:
            remark(
                f"note: a prompt of {len(ids):,} tokens exceeds the context of {block_size}; only its end is used"
            )
        return ids[context_start(len(ids), block_size) :]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def continuation(self, encoded: list[int], ids: list[int]) -> str:
        """The text of new tokens. Decoded with their prompt: some tokenizers mark a word's space in its first token."""
        prompt, both = self.decode(encoded), self.decode(encoded + ids)
        return both[len(prompt) :] if both.startswith(prompt) else self.decode(ids)

    def row(self, prompt: str, encoded: list[int], ids: list[int], seed: int) -> dict:
        reason = "length" if len(ids) >= self.max_tokens else "end_of_story"
        return {
            "prompt": prompt,
            "story": self.continuation(encoded[1:], ids),
            "tokens": len(ids),
            "seed": seed,
            "finish_reason": reason,
        }

    def write(self, prompts: list[str], seed: int, rows: dict[int, dict]) -> None:
        """Add a story for each prompt to `rows`, by the prompt's place; if Ctrl-C interrupts it, those that have
        ended."""
        encodings = {prompt: self.encode(prompt) for prompt in dict.fromkeys(prompts)}
        encoded = [encodings[prompt] for prompt in prompts]

        def store(place: int, ids: list[int]) -> None:
            rows[place] = self.row(prompts[place], encoded[place], ids, seed + place)

        # miniters=0: whether the bar is drawn depends on time alone
        with tqdm(total=len(prompts), unit="story", disable=None, delay=2, miniters=0, leave=False) as bar:
            for part in self.batches(encoded):
                written: dict[int, list[int]] = {place: [] for place in part}
                beginnings, seeds = [encoded[place] for place in part], [seed + place for place in part]
                steps = generate(self.decoder, beginnings, self.max_tokens, self.eot_id, self.sampling, seeds)
                for position, tokens in enumerate(steps, start=1):
                    for (place, ids), token in zip(written.items(), tokens, strict=True):
                        if token is not None:
                            ids.append(token)
                        elif ids and place not in rows:  # it has ended
                            store(place, ids)
                    bar.set_postfix_str(f"{position} tokens", refresh=False)
                    bar.update(len(rows) - bar.n)
                for place, ids in written.items():
                    if place not in rows:  # cut at max_tokens, or ended at once
                        store(place, ids)
                bar.update(len(rows) - bar.n)

    def batches(self, encoded: list[list[int]]) -> Iterator[list[int]]:
        """The places of prompts that are continued together, shortest first.

        Their KV cache fits in CACHE_BYTES. They are of similar length, since a longer one's tokens pass through the
        model one by one while the shortest is continued.
        """
        config, part = self.decoder.config, []
        numbers = 2 * config.n_layer * config.n_head * config.head_dim  # keys and values of a position
        bytes_per_position = numbers * self.decoder.cache_dtype.itemsize
        for place in sorted(range(len(encoded)), key=lambda place: len(encoded[place])):
            longest = min(config.block_size, len(encoded[place]) + self.max_tokens)
            full = (len(part) + 1) * longest * bytes_per_position > CACHE_BYTES
            if part and (full or len(encoded[place]) > 2 * len(encoded[part[0]]) + SIMILAR):
                yield part
                part = []
            part.append(place)
        yield part

    def stream(self, prompt: str, seed: int) -> dict:
        """Print one story as it is generated, in whole characters."""
        encoded = self.encode(prompt)  # which may print a note
        print(prompt, end="", flush=True)
        ids: list[int] = []
        text, printed = "", 0  # what is not printed yet; how many of the ids are
        for (token,) in generate(
            self.decoder, [encoded], self.max_tokens, self.eot_id, self.sampling, [seed]
        ):
            if token is not None:
                ids.append(token)
                before = (encoded[1:] + ids[:printed])[-DECODED_WITH:] if printed else encoded[1:]
                text = self.continuation(before, ids[printed:])
                if not (text.endswith("\ufffd") or BYTE.fullmatch(self.tokenizer.id_to_token(token) or "")):
                    print(text, end="", flush=True)
                    text, printed = "", len(ids)
        print(text, flush=True)  # a character that the end cut short
        return self.row(prompt, encoded, ids, seed)


def converse(writer: Writer, seed: int) -> None:
    """Continue what the user types, until end of file or Ctrl-C."""
    require(sys.stdin is not None, "--interactive reads from the keyboard, but standard input is closed")
    sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):  # not every Python has it
            importlib.import_module("readline")  # lets input() edit lines, and take long ones
    remark("Type the beginning of a story and press Enter (empty: a new story). Ctrl-D or Ctrl-C quits.")
    while True:
        try:
            prompt = as_prompt(input("> " if sys.stdin.isatty() else ""))
            if writer.stream(prompt, seed)["finish_reason"] == "length":
                remark(f"(cut at {writer.max_tokens} tokens: --max-tokens)")
        except (EOFError, KeyboardInterrupt):
            remark("")
            return
        seed += 1


if __name__ == "__main__":
    run_script(main)
