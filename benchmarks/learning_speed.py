"""How soon train.py's default recipe reaches what nanoGPT's recipe reaches, on the same stories.

python benchmarks/learning_speed.py                 8 minutes of training for each, on data/
python benchmarks/learning_speed.py --minutes 2

Both are trained by train.py, so the reference gains from its speed, too. The reference is the recipe that nanoGPT
ships, in the shape 8/8/256: GPT-2's blocks, AdamW (0.9, 0.95) with weight decay 0.1, a learning rate of 1e-3 after
5 % of warm-up, along a cosine to a tenth, gradients clipped at 1, 2,048 tokens a step, float32 on a CPU. Only
training time counts; compiling, saving and evaluating do not, for either (what the user waits in all is printed
too). Scores are evaluate.py's. The default recipe is trained once more with a small part of the time, because a
run that is short from the start lowers its learning rate in time.
"""

import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from model.checkpoint import list_checkpoints, load_checkpoint  # noqa: E402
from model.runtime import choose_device  # noqa: E402
from model.settings import UserError, read_settings, require, run_script  # noqa: E402

MINUTES = 8.0  # of training, for each recipe
SHORT = 0.05  # of these minutes, for the default recipe once more; 0 leaves that out
POINTS = 10  # checkpoints of each that are scored
MAX_SAMPLES = 300  # validation stories to score them on; 0 is all
PRESET = "stories-9m"  # of our arm
SEED = 1337  # of both runs
DEVICE = "auto"  # auto, cpu, cuda or mps
DATA_DIR = "data"  # holds tokenizer/ and processed/
PLOT = "learning_speed.png"  # where the curves go

OURS, REFERENCE = "default recipe", "nanoGPT's recipe"


def main() -> None:
    settings = read_settings(__file__)
    require(settings.minutes > 0, f"--minutes must be above 0, not {settings.minutes:g}")
    require(0 <= settings.short < 1, f"--short is a part of --minutes, from 0 to 1, not {settings.short:g}")
    require(settings.points >= 2, f"--points must be at least 2, not {settings.points}")
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
        print(f"the {OURS} did not reach that")
    else:
        print(f"the {OURS} passed that {soon(passed, goal)}")
    if settings.short:
        end = short[-1]
        reached = end["bits_per_byte"] <= goal["bits_per_byte"]
        print(
            f"given only {end['seconds']:.0f} s in all, it reached {end['bits_per_byte']:.4f}"
            + (f": that {soon(end['seconds'], goal)}" if reached else "")
        )
    draw(curves, settings.plot)
    print(f"curves in {settings.plot}")


def learn(arm: str, folder: Path, settings: SimpleNamespace, minutes: float, points: int) -> list[dict]:
    """Train one arm, score its checkpoints and print them; a few steps beforehand tell how long one takes."""
    step_seconds = train(arm, folder, settings, "--max-steps", 12, "--warmup-steps", 1)
    shutil.rmtree(folder)
    steps = max(points, round(60 * minutes / step_seconds))
    warmup = ["--warmup-steps", max(1, steps // 20)] if arm == REFERENCE else []
    limits = ["--max-steps", 100 * steps, "--max-minutes", minutes]
    started = time.perf_counter()
    train(arm, folder, settings, *limits, *warmup, "--save-interval", max(1, steps // points))
    waited = time.perf_counter() - started
    paths = sorted(list_checkpoints(folder), key=lambda path: int(path.stem.split("_")[1]))
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
    print(f"{arm:17s} took {waited:.0f} s from start to end, compiling and saving included", flush=True)
    return curve


def train(arm: str, folder: Path, settings: SimpleNamespace, *limits: object) -> float:
    """Run train.py; returns the median seconds of a step, the first left out."""
    preset = "tinystories-gpt" if arm == REFERENCE else settings.preset
    flags = ["--preset", preset, "--data-dir", settings.data_dir, "--checkpoint-dir", folder]
    flags += ["--device", settings.device, "--seed", settings.seed, "--keep", 10**6, "--log-interval", 1]
    flags += ["--eval-interval", 10**9, "--eval-tokens", 1, "--sample-tokens", 0]
    if arm == REFERENCE:
        flags += ["--learning-rate", 1e-3, "--weight-decay", 0.1]
        flags += ["--schedule", "cosine", "--decay-fraction", 0.95, "--final-learning-rate", 0.1]
        flags += ["--grad-clip", 1, "--batch-tokens", 2_048, "--dropout", 0, "--no-mask-stories"]
        if choose_device(settings.device).type == "cpu":
            flags += ["--dtype", "float32"]
    script("train.py", *flags, *limits)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ends = [row["seconds"] for row in rows if "train_loss" in row]
    steps = sorted(after - before for before, after in itertools.pairwise(ends[1:]))
    return steps[len(steps) // 2]


def script(name: str, *words: object) -> None:
    command = [sys.executable, str(REPO / name), *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"{name} failed: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")


def when(curve: list[dict], goal: float) -> float | None:
    """The second at which a curve, straight between its points, first comes down to the goal."""
    if curve[0]["bits_per_byte"] <= goal:
        return curve[0]["seconds"]
    for before, after in itertools.pairwise(curve):
        if after["bits_per_byte"] <= goal:
            part = (before["bits_per_byte"] - goal) / (before["bits_per_byte"] - after["bits_per_byte"])
            return before["seconds"] + part * (after["seconds"] - before["seconds"])
    return None


def soon(seconds: float, goal: dict) -> str:
    return f"after at most {seconds:.0f} s, {goal['seconds'] / seconds:.1f} times as soon"


def draw(curves: dict[str, list[dict]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for axis, across in zip(axes, ("seconds", "tokens"), strict=True):
        for arm, points in curves.items():
            axis.plot(
                [p[across] for p in points], [p["bits_per_byte"] for p in points], marker="o", label=arm
            )
        axis.set_xlabel("seconds of training" if across == "seconds" else "tokens seen")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("bits per byte of validation stories")
    axes[0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_script(main)
