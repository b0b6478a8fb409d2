"""How soon train.py's default recipe reaches the score of nanoGPT's recipe, on the same stories.

python benchmarks/learning_speed.py                 8 minutes of training for each recipe, on data/
python benchmarks/learning_speed.py --minutes 2

Both are trained by train.py, so the reference benefits from its speed too. The reference is nanoGPT's recipe, scaled
to a CPU, with shape 8/8/256: GPT-2's blocks, AdamW (0.9, 0.95) with weight decay 0.1, a learning rate of 1e-3 after
5 % warm-up, cosine decay to a tenth, gradients clipped at 1, 2,048 tokens per step, and on a CPU, as nanoGPT trains in
float32 there, float32 unless --reference-dtype auto gives it the precision of the default recipe. Only training time
counts, not compilation, saving and evaluation (the total time is printed too). Scores are evaluate.py's. The default
recipe is also trained with a small fraction of the time, because a run planned to be short decays its learning rate
in time.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.checkpoint import list_checkpoints, load_checkpoint
from model.errors import UserError
from model.metrics import read_rows
from model.runtime import choose_device
from model.script import run_script
from model.settings import REPO, read_settings, require_within

MINUTES: float = 8.0  # minutes of training per recipe
SHORT: float = 0.05  # fraction of MINUTES for a second run of the default recipe; 0 skips it
POINTS: int = 10  # checkpoints scored per recipe
MAX_SAMPLES: int = 300  # validation stories to score them on; 0 is all
PRESET: str = "stories-9m"  # preset of the default recipe
SEED: int = 1337  # for all runs
DEVICE: str = "auto"  # auto, cpu, cuda or mps
DATA_DIR: str = "data"  # folder with tokenizer/ and processed/
REFERENCE_DTYPE: str = "float32"  # of the reference on a CPU; auto: as ours
PLOT: str = "learning_speed.png"  # image file for the curves

OURS, REFERENCE = "default recipe", "nanoGPT's recipe"


def main() -> None:
    settings = read_settings(__file__)
    require_within(settings, minutes="(0, inf)", short="[0, 1)", points="[2, inf)")
    curves = {}
    with tempfile.TemporaryDirectory() as folder:
        for arm in (REFERENCE, OURS):
            curves[arm] = learn(
                arm, Path(folder) / arm.split()[0], settings, settings.minutes, settings.points
            )
        if settings.short:
            short = learn(OURS, Path(folder) / "short", settings, settings.short * settings.minutes, 1)
    goal = curves[REFERENCE][-1]
    print(f"{REFERENCE} reached {goal['bits_per_byte']:.4f} bits per byte after {goal['seconds']:.0f} s")
    passed = when(curves[OURS], goal["bits_per_byte"])
    if passed is None:
        print(f"the {OURS} did not reach this score")
    else:
        print(f"the {OURS} reached this score {soon(passed, goal)}")
    if settings.short:
        end = short[-1]
        reached = end["bits_per_byte"] <= goal["bits_per_byte"]
        print(
            f"given only {end['seconds']:.0f} s in total, it reached {end['bits_per_byte']:.4f}"
            + (f": this score {soon(end['seconds'], goal)}" if reached else "")
        )
        curves[f"{OURS}, {end['seconds']:.0f} s in total"] = short[-1:]
    draw(curves, settings.plot)
    print(f"curves written to {settings.plot}")


def learn(arm: str, folder: Path, settings: SimpleNamespace, minutes: float, points: int) -> list[dict]:
    """Train one arm, then score and print its checkpoints; a short run beforehand measures the time per step."""
    step_seconds = train(
        arm, folder, settings, "--max-steps", 12, "--max-minutes", minutes, "--warmup-steps", 1
    )
    shutil.rmtree(folder)
    steps = max(points, round(60 * minutes / step_seconds))
    warmup = ["--warmup-steps", max(1, steps // 20)] if arm == REFERENCE else []
    started = time.perf_counter()
    train(
        arm, folder, settings, "--max-minutes", minutes, *warmup, "--save-interval", max(1, steps // points)
    )
    waited = time.perf_counter() - started
    paths = list_checkpoints(folder)[::-1]
    flags = [
        "--data-dir",
        settings.data_dir,
        "--device",
        settings.device,
        "--max-samples",
        settings.max_samples,
    ]
    script("evaluate.py", *flags, "--output", folder / "scores.json", "--checkpoint", *paths)
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))["results"]
    curve = []
    for path, score in zip(paths, scores, strict=True):
        checkpoint = load_checkpoint(path)
        tokens = checkpoint["step"] * checkpoint["settings"]["batch_tokens"]
        kept = {name: score[name] for name in ("loss", "bits_per_byte")}
        curve.append({"seconds": checkpoint["seconds"], "tokens": tokens, **kept})
        print(
            f"{arm:17s} {checkpoint['seconds']:7.1f} s  {tokens:>12,} tokens  "
            f"{score['loss']:.4f} nats per token  {score['bits_per_byte']:.4f} bits per byte",
            flush=True,
        )
    print(f"{arm:17s} took {waited:.0f} s from start to end, including compilation and saving", flush=True)
    return curve


def train(arm: str, folder: Path, settings: SimpleNamespace, *limits: object) -> float:
    """Run train.py; return the median seconds per step, without the first."""
    preset = "tinystories-gpt" if arm == REFERENCE else settings.preset
    flags = ["--preset", preset, "--data-dir", settings.data_dir, "--checkpoint-dir", folder]
    flags += ["--device", settings.device, "--seed", settings.seed, "--keep", 10**6, "--log-interval", 1]
    flags += ["--eval-interval", 10**9, "--eval-tokens", 1, "--sample-tokens", 0]
    if arm == REFERENCE:
        flags += ["--learning-rate", 1e-3, "--weight-decay", 0.1]
        flags += ["--schedule", "cosine", "--decay-fraction", 0.95, "--final-learning-rate", 0.1]
        flags += ["--grad-clip", 1, "--batch-tokens", 2_048, "--dropout", 0, "--no-mask-stories"]
        if choose_device(settings.device).type == "cpu":
            flags += ["--dtype", settings.reference_dtype]
    script("train.py", *flags, *limits)
    ends = [row["seconds"] for row in read_rows(folder / "metrics.jsonl") if "train_loss" in row]
    steps = sorted(after - before for before, after in itertools.pairwise(ends[1:]))
    return steps[len(steps) // 2]


def script(name: str, *words: object, **environment: str) -> None:
    command = [sys.executable, str(REPO / name), *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if result.returncode:
        message = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{name} failed: {message.removeprefix('error: ')}")


def when(curve: list[dict], goal: float) -> float | None:
    """The time in seconds at which a curve, linear between its points, first reaches the goal."""
    if curve[0]["bits_per_byte"] <= goal:
        return curve[0]["seconds"]
    for before, after in itertools.pairwise(curve):
        if after["bits_per_byte"] <= goal:
            part = (before["bits_per_byte"] - goal) / (before["bits_per_byte"] - after["bits_per_byte"])
            return before["seconds"] + part * (after["seconds"] - before["seconds"])
    return None


def soon(seconds: float, goal: dict) -> str:
    return f"after at most {seconds:.0f} s, {goal['seconds'] / seconds:.1f} times as fast"


def draw(curves: dict[str, list[dict]], path: str) -> None:
    """Bits per byte against seconds and against tokens; a star is a short run of its own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, across, unit in zip(axes, ("seconds", "tokens"), (60, 1e6), strict=True):
        for arm, points in curves.items():
            x, y = [point[across] / unit for point in points], [point["bits_per_byte"] for point in points]
            whole = arm in (OURS, REFERENCE)
            axis.plot(x, y, marker="o" if whole else "*", markersize=4 if whole else 10, label=arm)
        axis.set_xlim(left=0)
        axis.set_xlabel("minutes of training" if across == "seconds" else "million tokens seen")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("bits per byte of validation stories")
    axes[0].legend()
    FigureCanvasAgg(figure).print_png(path)


if __name__ == "__main__":
    run_script(main)
