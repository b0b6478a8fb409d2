"""Step 6: how well does a model predict stories that it has not seen?

python evaluate.py                                           the latest checkpoint, all validation stories
python evaluate.py --checkpoint best 1000 --max-samples 500  two checkpoints side by side

Each story is scored from its own beginning, after <|endoftext|>, to its own end, which counts as a token.
Beyond the model's context a window slides by half of it, and each token is scored once. Bits per byte
(summed loss / ln 2 / UTF-8 bytes) can be compared between tokenizers, loss per token and perplexity cannot.
"""

import math
import shlex
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tqdm import tqdm

from model.batches import Split, load_data
from model.checkpoint import find_checkpoint, load_model
from model.files import shown, write_json
from model.generation import continue_text, text_tokenizer
from model.gpt import GPT
from model.runtime import Runtime, choose_runtime
from model.settings import read_settings, require, run_script

CHECKPOINT: list[str] = []  # files or folders, "best", "latest" or steps; none: the latest
CHECKPOINT_DIR = "checkpoints"  # where best, latest and steps are looked for
DATA_DIR = "data"  # holds tokenizer/ and processed/
SPLIT = "validation"  # train, validation or all
MAX_SAMPLES = 0  # stories to score, evenly spread over the split; 0 is all
BATCH_SIZE = 0  # windows in one forward pass; 0 packs about 16,000 tokens
PROMPT: list[str] = []  # also print how each checkpoint continues these beginnings
OUTPUT: str | None = None  # write the results to this .json file
SEED = 1337  # of the continuations
DEVICE = "auto"  # auto, cpu, cuda, cuda:1 or mps
DTYPE = "float32"  # float32, or for speed bfloat16 or float16


def main() -> None:
    settings = read_settings(
        __file__,
        choices={
            "split": ("train", "validation", "all"),
            "dtype": ("auto", "float32", "bfloat16", "float16"),
        },
        aliases={"model": "checkpoint", "max-stories": "max-samples"},
    )
    require(settings.max_samples >= 0, f"--max-samples must be 0 (all) or more, not {settings.max_samples}")
    require(settings.batch_size >= 0, f"--batch-size must be 0 (found) or more, not {settings.batch_size}")
    names = settings.checkpoint or [None]
    paths = [find_checkpoint(settings.checkpoint_dir, name, prefer="latest") for name in names]
    stories = read_stories(settings)
    runtime = choose_runtime(settings.device, settings.dtype, "off")
    results = []
    for path in paths:
        model, tokenizer, checkpoint = load_model(path, runtime.device)
        facts = {
            "checkpoint": shown(path),
            "step": checkpoint["step"],
            "parameters": model.count_parameters(),
        }
        started = time.perf_counter()
        scores = score_stories(model, tokenizer, checkpoint["eot_id"], stories, runtime, settings.batch_size)
        results.append({**facts, **summarise(scores), "seconds": round(time.perf_counter() - started, 2)})
        for prompt in settings.prompt:
            story = continue_text(model, tokenizer, checkpoint["eot_id"], prompt, 200, settings.seed)
            print(f"{shown(path)}: {story}\n")
    print_results(results, len(stories), settings.split)
    if settings.output is not None:
        report = {
            "command": shlex.join(["python", *sys.argv]),
            "torch": torch.__version__,
            "device": runtime.reasons,
            "split": settings.split,
            "results": results,
        }
        write_json(Path(settings.output), report)
        print(f"written to {settings.output}")


def read_stories(settings: SimpleNamespace) -> list[str]:
    """The text of the chosen stories of the chosen split, decoded from the packed tokens."""
    data = load_data(settings.data_dir)
    tokenizer = text_tokenizer(data.tokenizer_json)
    splits = {"train": [data.train], "validation": [data.validation], "all": [data.train, data.validation]}
    bounds = [(split, *ends) for split in splits[settings.split] for ends in story_bounds(split, data.eot_id)]
    if settings.max_samples and settings.max_samples < len(bounds):
        chosen = np.linspace(0, len(bounds) - 1, settings.max_samples).round().astype(int)
        bounds = [bounds[k] for k in chosen]
    return tokenizer.decode_batch(
        [split.tokens[first:end].tolist() for split, first, end in bounds], skip_special_tokens=False
    )


def story_bounds(split: Split, eot_id: int) -> list[tuple[int, int]]:
    """Where each story begins and ends (before its end-of-text token) among the tokens."""
    ends = np.flatnonzero(np.asarray(split.tokens) == eot_id)
    return list(zip([0, *(ends[:-1] + 1).tolist()], ends.tolist(), strict=True))


def sliding_windows(length: int, block_size: int) -> list[tuple[int, int, int]]:
    """(first, end, scored from) of each window over a sequence, so that each position is scored once.

    Windows begin half a context apart; each scores what those before it did not.
    """
    windows, end = [], 0
    while end < length:
        first = max(0, len(windows) * max(1, block_size // 2))
        windows.append((first, min(length, first + block_size), end))
        end = windows[-1][1]
    return windows


@torch.no_grad()
def score_stories(
    model: GPT, tokenizer: Tokenizer, eot_id: int, stories: list[str], runtime: Runtime, batch_size: int
) -> dict[str, np.ndarray]:
    """For each story: its loss in nats, tokens (its end included), bytes, and tokens predicted rightly."""
    encoded = tokenizer.encode_batch_fast(stories, add_special_tokens=False)
    sequences = [np.array([eot_id, *encoding.ids, eot_id]) for encoding in encoded]
    windows = [
        (story, *window)
        for story, ids in enumerate(sequences)
        for window in sliding_windows(len(ids) - 1, model.config.block_size)
    ]
    windows.sort(key=lambda w: w[1] - w[2])  # longest first, so that a batch has windows of one length
    loss, right = np.zeros(len(stories)), np.zeros(len(stories), dtype=int)
    with tqdm(total=len(windows), unit="window", disable=None, delay=1, leave=False) as bar:
        position = 0
        while position < len(windows):
            longest = windows[position][2] - windows[position][1]
            batch = windows[position : position + (batch_size or max(1, 16_384 // longest))]
            position += len(batch)
            inputs = np.full((len(batch), longest), eot_id)
            targets = np.full((len(batch), longest), -1)
            for row, (story, first, end, scored) in enumerate(batch):
                inputs[row, : end - first] = sequences[story][first:end]
                targets[row, scored - first : end - first] = sequences[story][scored + 1 : end + 1]
            losses, hits = score_batch(model, inputs, targets, runtime)
            owners = [window[0] for window in batch]
            np.add.at(loss, owners, losses)
            np.add.at(right, owners, hits)
            bar.update(len(batch))
    tokens = np.array([len(ids) - 1 for ids in sequences])
    return {
        "loss": loss,
        "right": right,
        "tokens": tokens,
        "bytes": np.array([len(s.encode()) for s in stories]),
    }


def score_batch(
    model: GPT, inputs: np.ndarray, targets: np.ndarray, runtime: Runtime
) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss and right predictions of each row (B, T); targets of -1 do not count."""
    idx = torch.from_numpy(inputs).to(runtime.device)
    wanted = torch.from_numpy(targets).to(runtime.device)
    with runtime.autocast():
        logits = model(idx)
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), wanted.flatten(), reduction="none", ignore_index=-1
    )
    hits = logits.argmax(-1) == wanted
    return losses.view(wanted.shape).cpu().double().sum(1).numpy(), hits.sum(1).cpu().numpy()


def summarise(scores: dict[str, np.ndarray]) -> dict[str, float]:
    total = {name: values.sum().item() for name, values in scores.items()}
    loss = total["loss"] / total["tokens"]
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": total["loss"] / math.log(2) / total["bytes"],
        "accuracy": total["right"] / total["tokens"],
        "stories": len(scores["loss"]),
        "tokens": total["tokens"],
        "bytes": total["bytes"],
    }


def print_results(results: list[dict], stories: int, split: str) -> None:
    """One checkpoint as lines of `key: value`, several as a table."""
    print(f"{stories:,} {split} stories" if split != "all" else f"all {stories:,} stories")
    if len(results) == 1:
        for key, value in results[0].items():
            print(f"{key}: {value:.4f}" if isinstance(value, float) else f"{key}: {value}")
        return
    width = max(len(result["checkpoint"]) for result in results)
    print(
        f"{'checkpoint':<{width}}  {'step':>8}  {'loss':>7}  {'perplexity':>10}  {'bits/byte':>9}  {'accuracy':>8}"
    )
    for r in results:
        print(
            f"{r['checkpoint']:<{width}}  {r['step']:>8,}  {r['loss']:>7.4f}  {r['perplexity']:>10.3f}  "
            f"{r['bits_per_byte']:>9.4f}  {r['accuracy']:>8.2%}"
        )


if __name__ == "__main__":
    run_script(main)
