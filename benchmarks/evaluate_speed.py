"""Scoring speed compared to bare forward passes, alternating in one run.

python benchmarks/evaluate_speed.py --checkpoint best --max-samples 300

The forward passes run on full windows of random tokens and discard their logits, at several batch sizes, of which
the fastest counts. Scoring encodes the text, pads, slides, and computes loss and accuracy. It is given twice: by the
tokens that it scores, and by those that the model reads, since a sliding window reads half of its tokens again.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.script import run_script  # before torch: see there

# isort: split
import torch

from model.candidates import OwnModel
from model.checkpoint import find_checkpoint
from model.packed_data import load_data, real_stories
from model.runtime import GPU_LOGITS, Runtime, choose_device, choose_runtime, tokens_at_once
from model.scoring import score_stories, sliding_windows
from model.settings import read_settings

CHECKPOINT: str | None = None  # a file or folder, "best", "latest" or a step; None: latest
CHECKPOINT_DIR: str = "checkpoints"  # where to look for best, latest and steps
DATA_DIR: str = "data"  # folder with tokenizer/ and processed/
MAX_SAMPLES: int = 300  # validation stories; 0 is all
ROUNDS: int = 7  # rounds, each measuring both
DEVICE: str = "auto"  # auto, cpu, cuda, cuda:1 or mps
DTYPE: str = "float32"  # float32, bfloat16 or float16


def main() -> None:
    settings = read_settings(__file__)
    runtime = choose_runtime(choose_device(settings.device), settings.dtype, "off")
    path = find_checkpoint(settings.checkpoint_dir, settings.checkpoint, prefer="latest")
    candidate = OwnModel(path, runtime.device)
    data = load_data(settings.data_dir)
    stories = real_stories([data.validation], data, settings.max_samples)
    print(f"{len(stories):,} stories; {candidate.facts['parameters']:,} parameters; {runtime.description}")
    sizes = [tokens_at_once(runtime.device, 1) * factor // 2 for factor in (1, 2, 4, 16)]
    if runtime.device.type != "cpu":  # all logits of a forward pass exist at once
        sizes = [size for size in sizes if size * candidate.vocab_size <= 8 * GPU_LOGITS] or sizes[:1]
    speeds = {f"forward, {size:,} tokens at once": [] for size in sizes} | {"scoring": []}
    for turn in range(settings.rounds + 1):
        for name, size in zip(speeds, [*sizes, 0], strict=True):
            started = time.perf_counter()
            if size:
                tokens = forward(candidate, size, runtime)
            else:
                lengths = score_stories(candidate, stories, runtime).tokens.tolist()
                tokens = sum(lengths)
            if turn:  # the first round is warm-up
                speeds[name].append(tokens / (time.perf_counter() - started))
    for name, values in speeds.items():
        print(f"{name}: {statistics.median(values):,.0f} tokens/s ({min(values):,.0f} to {max(values):,.0f})")
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    scoring = medians.pop("scoring")
    share = scoring / max(medians.values())
    of_read = share * tokens_read(lengths, candidate.block_size) / sum(lengths)
    print(f"scoring reaches {share:.0%} of the fastest forward pass; with what is read again, {of_read:.0%}")


@torch.no_grad()
def forward(candidate: OwnModel, tokens: int, runtime: Runtime) -> int:
    """Run forward passes for two seconds; return the number of tokens processed."""
    rows = max(1, tokens // candidate.block_size)
    idx = torch.randint(candidate.vocab_size, (rows, candidate.block_size), device=runtime.device)
    seconds, count, started = 2.0, 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        with runtime.autocast():
            candidate.network(idx)
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()
        count += idx.numel()
    return count


def tokens_read(lengths: list[int], block_size: int) -> int:
    """The tokens that a model reads to score stories of these lengths."""
    windows = [window for length in lengths for window in sliding_windows(0, length, block_size)]
    return sum(window.end - window.first for window in windows)


if __name__ == "__main__":
    run_script(main)
