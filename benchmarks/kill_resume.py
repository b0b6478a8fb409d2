"""Kill a run repeatedly at random moments; it must end like one that was never interrupted.

python benchmarks/kill_resume.py                      50 kills, a few minutes on two CPU cores
python benchmarks/kill_resume.py --kills 10 --seed 2

A tiny model trains, by default on built-in stories, saving and evaluating so often that many kills
(SIGKILL, which cannot be caught) hit these. After each kill, the same `python train.py` command resumes. At the end,
the metrics (except timings and a GPU's memory) and the weights are compared to the uninterrupted run's. Prints a
tally; exits with status 1 if they differ.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.checkpoint import list_checkpoints, load_checkpoint, step_of
from model.errors import require
from model.metrics import read_rows
from model.script import run_script
from model.settings import REPO, read_settings

KILLS: int = 50  # number of kills
SEED: int = 1  # for the moments of the kills
MAX_STEPS: int = 1_000  # length of the run
DTYPE: str = "bfloat16"  # float32 or bfloat16
COMPILE: str = "off"  # on or off: torch.compile
LONGEST: float = 1.5  # maximum seconds of training before a kill
DATA: str | None = None  # data folder of steps 1 to 3; None: makes one of built-in stories

TINY = """--preset quickstart --n-layer 2 --n-head 2 --n-embd 32 --block-size 32 --batch-tokens 512
--dropout 0.1 --eval-interval 4 --save-interval 3 --eval-tokens 512 --log-interval 1 --sample-tokens 4
--deterministic""".split()


def main() -> None:
    settings = read_settings(__file__)
    moments = random.Random(settings.seed)
    with tempfile.TemporaryDirectory() as folder:
        data, whole, killed = (Path(folder) / name for name in ("data", "whole", "killed"))
        if settings.data:
            data = Path(settings.data).expanduser()
        else:
            pack_stories(data)
        flags = [*TINY, "--max-steps", str(settings.max_steps)]
        flags += ["--dtype", settings.dtype, "--compile", settings.compile]
        if not settings.data:  # larger checkpoints, which more kills hit
            flags += ["--vocab-size", "2000"]
        first = start(data, whole, flags)
        first.communicate()
        require(first.returncode == 0, "the run that is not to be interrupted failed")
        tally, repeated = Counter(), 0
        while tally.total() < settings.kills:
            process = start(data, killed, flags)
            for line in process.stdout:  # the last line before the first step
                if line.startswith("micro-batch"):
                    break
            time.sleep(moments.uniform(0, settings.longest))
            if process.poll() is not None:
                break
            process.kill()
            process.wait()
            moment, lost = what_it_was_doing(killed)
            tally[moment] += 1
            repeated += lost
            print(f"kill {tally.total()}: {moment}", flush=True)
        last = start(data, killed, flags)
        last.communicate()
        same = last.returncode == 0 and compare(whole, killed, settings.max_steps)
    for moment, count in tally.most_common():
        print(f"{moment}: {count}")
    print(f"steps_done_twice: {repeated}\nkills: {tally.total()}\nidentical: {same}")
    sys.exit(0 if same else 1)


def pack_stories(data: Path) -> None:
    for words in (
        ["data/ingestion.py", "--source", "sample", "--max-stories", "300"],
        ["data/train_tokenizer.py", "--vocab-size", "400"],
        ["data/prepare_data.py"],
    ):
        subprocess.run([sys.executable, REPO / words[0], *words[1:], "--data-dir", data], check=True)


def start(data: Path, folder: Path, flags: list[str]) -> subprocess.Popen:
    command = [sys.executable, REPO / "train.py", *flags, "--data-dir", data, "--checkpoint-dir", folder]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)


def what_it_was_doing(folder: Path) -> tuple[str, int]:
    """What the kill interrupted, judged by the files it left, and the steps since the latest checkpoint."""
    saved = max([step_of(path) for path in list_checkpoints(folder)], default=0)
    rows = read_rows(folder / "metrics.jsonl")
    lost = max([row["step"] for row in rows if "train_loss" in row], default=0) - saved
    half_written = [path.name for path in folder.glob(".*.tmp")]
    if any(".pt." in name for name in half_written):
        return "while writing a checkpoint", lost
    if half_written:
        return "while writing the loss curve or the samples", lost
    if rows and "validation_loss" in rows[-1]:
        return "after an evaluation, before the next step", lost
    if rows and rows[-1]["step"] % 4 == 0:
        return "during an evaluation", lost
    return "between other steps", lost


def compare(whole: Path, killed: Path, step: int) -> bool:
    """Whether both runs left the same metrics, except timings and memory, and the same weights."""

    def rows(folder: Path) -> list[str]:
        clock = ("seconds", "tokens_per_second", "gpu_bytes")
        kept = [
            {k: v for k, v in row.items() if k not in clock} for row in read_rows(folder / "metrics.jsonl")
        ]
        return [json.dumps(row) for row in kept]

    same = rows(whole) == rows(killed)
    for name in (f"ckpt_{step}.pt", "best.pt"):
        one, other = (load_checkpoint(folder / name)["weights"] for folder in (whole, killed))
        same &= all((one[key] == other[key]).all().item() for key in one)
    return same


if __name__ == "__main__":
    run_script(main)
