"""What each part of train.py's default recipe is worth: every run changes one thing.

python benchmarks/ablations.py                                            the changes below, on data/
python benchmarks/ablations.py --changes n-head=2 "n-layer=6 n-embd=320"  your own

A change is one or more flags of train.py, without their dashes. The recipe and each change train with the same seeds
for the same number of steps, and evaluate.py scores them on the same validation stories. So a difference is in what is
learnt per token; what a change costs in time shows in tokens per second, as far as the runs beside it permit. It is
called better or worse if the mean moves by more than the scores of either differ between seeds.
"""

import json
import os
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.learning_speed import script
from model.metrics import read_rows
from model.script import run_script
from model.settings import read_settings, require_within

CHANGES: list[str] = []  # changes to try; empty: those listed below
PRESET: str = "stories-9m"  # preset whose recipe is changed
FLAGS: list[str] = []  # flags of train.py for all runs, without their dashes
STEPS: int = 122  # optimizer steps per run; 122 of 2,048 tokens are about a minute on two CPU cores
BATCH_TOKENS: int = 2_048  # tokens per step
SEEDS: int = 3  # seeds per change, from 1 up
MAX_SAMPLES: int = 300  # validation stories to score each run on; 0 is all
AT_ONCE: int = 2  # runs at the same time, which share the CPU's cores; 1 on a GPU
DEVICE: str = "auto"  # auto, cpu, cuda or mps
DATA_DIR: str = "data"  # folder with tokenizer/ and processed/

RECIPE = "the recipe"
ALL = [
    "no-mask-stories",
    "no-bigram-start",
    "tie-weights",
    "grow-at=0",
    "no-sampled-softmax",
    "optimizer=adamw",
    "learning-rate=0.003",
    "learning-rate=0.012",
    "schedule=cosine",
    "decay-fraction=0.4",
    "decay-fraction=0.8",
    "final-learning-rate=0.1",
    "warmup-steps=0",
    "warmup-steps=40",
    "weight-decay=0",
    "weight-decay=0.3",
    "grad-clip=0",
    "grad-clip=0.4",
    "dropout=0.1",
    "n-head=2",
    "n-head=8",
    "n-kv-head=2",
    "blocks=gpt2",
]


def main() -> None:
    settings = read_settings(__file__)
    require_within(settings, steps="[1, inf)", seeds="[1, inf)", at_once="[1, inf)")
    changes = [RECIPE, *(settings.changes or ALL)]
    runs = [(change, seed) for change in changes for seed in range(1, settings.seeds + 1)]
    results = {change: [] for change in changes}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(settings.at_once) as pool:
        futures = [pool.submit(learn, change, seed, Path(folder), settings) for change, seed in runs]
        try:
            for (change, seed), future in zip(runs, futures, strict=True):
                results[change].append(future.result())
                score, speed = results[change][-1]
                print(
                    f"{change:30s} seed {seed}: {score:.4f} bits per byte, {speed:,.0f} tokens/s", flush=True
                )
        finally:
            pool.shutdown(cancel_futures=True)
    print_table(results)


def learn(change: str, seed: int, folder: Path, settings: SimpleNamespace) -> tuple[float, float]:
    """Train with one change; return its bits per byte, and tokens per second by the median step."""
    run = folder / f"{change} {seed}".replace("/", " ")
    threads = max(1, (os.cpu_count() or 1) // settings.at_once)
    env = {"OMP_NUM_THREADS": str(threads)} if settings.at_once > 1 else {}
    common = ["--data-dir", settings.data_dir, "--device", settings.device]
    flags = [*common, "--checkpoint-dir", run, "--preset", settings.preset, "--seed", seed]
    flags += ["--max-steps", settings.steps, "--max-minutes", "none", "--batch-tokens", settings.batch_tokens]
    flags += ["--eval-interval", 10**9, "--eval-tokens", 1, "--sample-tokens", 0, "--log-interval", 1]
    own = [] if change == RECIPE else change.split()
    script("train.py", *flags, *(f"--{flag}" for flag in [*settings.flags, *own]), **env)
    flags = [*common, "--checkpoint-dir", run, "--max-samples", settings.max_samples]
    script("evaluate.py", *flags, "--output", run / "scores.json", **env)
    (row,) = json.loads((run / "scores.json").read_text(encoding="utf-8"))["results"]
    speeds = [row["tokens_per_second"] for row in read_rows(run / "metrics.jsonl") if "train_loss" in row]
    return row["bits_per_byte"], statistics.median(speeds)


def print_table(results: dict[str, list[tuple[float, float]]]) -> None:
    scores = {change: [score for score, _ in runs] for change, runs in results.items()}
    print("\n| change | bits per byte | mean | difference | | tokens/s |\n" + "| --- " * 6 + "|")
    for change, runs in results.items():
        mean = statistics.mean(scores[change])
        difference = mean - statistics.mean(scores[RECIPE])
        spread = max(max(some) - min(some) for some in (scores[change], scores[RECIPE]))
        verdict = "no difference" if abs(difference) <= spread else "better" if difference < 0 else "worse"
        if len(runs) == 1:  # which has no spread
            verdict = ""
        compared = f"{difference:+.4f} | {verdict}" if change != RECIPE else "| "
        each = ", ".join(f"{score:.4f}" for score in scores[change])
        speed = statistics.median(speed for _, speed in runs)
        print(f"| {change} | {each} | {mean:.4f} | {compared} | {speed:,.0f} |")


if __name__ == "__main__":
    run_script(main)
