"""Speed and memory of the first three steps, compared to the usual ways.

python benchmarks/prepare_speed.py                                        200 MB from built-in stories; takes minutes
python benchmarks/prepare_speed.py --stories my_stories/train.txt
python benchmarks/prepare_speed.py --megabytes 2000 --rounds 0 --folder big   without the usual ways

The corpus repeats the stories; each copy replaces one word of each story by a new made-up name, so that all stories
differ and new words keep coming. The usual way to train a tokenizer is train_from_iterator over all stories; the
usual way to pack is datasets.map with encode_batch in one process per core, then a memmap. They alternate with the
scripts, and the results must be byte-identical. Timings are of whole processes, including start-up. Memory is the
anonymous memory of a script and its child processes, sampled ten times per second.
"""

import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from data.prepare_data import available_cores
from data.raw_stories import read_manifest
from data.sample_stories import sample_stories
from data.story_files import read_file
from model.errors import require
from model.files import sha256_file
from model.script import run_script
from model.settings import REPO, read_settings

STORIES: str | None = None  # a file of stories to build the corpus from; None: the built-in ones
MEGABYTES: int = 200  # corpus size
ROUNDS: int = 3  # rounds alternating a step and the usual way; 0 runs each step once, alone
WORKERS: int = 0  # encoding processes; 0: one per core
FOLDER: str | None = None  # working folder, kept and reused; None: a temporary one
PARTS: list[str] = ["ingestion", "tokenizer", "packing"]  # what to measure
USUAL: str | None = None  # "tokenizer" or "packing": run only the usual way (the script calls itself so)

LETTERS = "bdfgklmnprstvz"


def main() -> None:
    settings = read_settings(__file__)
    if settings.usual:
        usual = {"tokenizer": train_the_usual_way, "packing": pack_the_usual_way}[settings.usual]
        return usual(Path(settings.folder), settings.workers or available_cores())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(settings.folder or temporary)
        corpus, data = folder / "corpus.txt", folder / "data"
        files = {
            "ingestion": [data / "raw" / "manifest.json"],
            "tokenizer": [data / "tokenizer" / "tokenizer.json"],
            "packing": [data / "processed" / "meta.json", data / "processed" / "train.bin"],
        }
        scripts = {
            "ingestion": ["data/ingestion.py", "--source", corpus],
            "tokenizer": ["data/train_tokenizer.py"],
            "packing": ["data/prepare_data.py", "--workers", settings.workers],
        }
        for part in settings.parts:
            require(part in scripts, f"--parts takes {', '.join(scripts)}, not {part!r}")
        if not corpus.exists():
            folder.mkdir(parents=True, exist_ok=True)
            make_corpus(corpus, settings.stories, settings.megabytes * 10**6)
        for part in settings.parts:
            ours, theirs, usual_file = [], [], folder / f"usual_{part}"
            alone = part == "ingestion" or settings.rounds == 0
            for _ in range(1 if alone else settings.rounds):
                for file in files[part]:
                    file.unlink(missing_ok=True)
                ours.append(measure([REPO / scripts[part][0], *scripts[part][1:], "--data-dir", data]))
                if not alone:
                    usual = ["--usual", part, "--folder", folder, "--workers", settings.workers]
                    theirs.append(measure([__file__, *usual]))
                    require(same(files[part][-1], usual_file), f"{part}: the usual way's result differs")
            report(part, size_of(data, part), ours, theirs)


def make_corpus(path: Path, source: str | None, size: int) -> None:
    rng = random.Random(1)
    stories = read_file(Path(source), "text") if source else sample_stories(20_000, 1)
    originals = [story.strip().split(" ") for story in stories if story.strip()]
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            names = [
                "".join(rng.choice(LETTERS) + rng.choice("aeiou") for _ in range(4)) for _ in range(1_000)
            ]
            for words in originals:
                changed = list(words)
                changed[rng.randrange(len(words))] = rng.choice(names).title()
                file.write(" ".join(changed) + "\n<|endoftext|>\n")


# Measuring


def measure(command: list) -> dict:
    """Seconds of a command, and its peak anonymous memory in MB: of one process, and of all together."""
    words = [sys.executable, *map(str, command)]
    start = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    peak = {"one": 0.0, "all": 0.0}
    while process.poll() is None:
        sizes = [anonymous(pid) for pid in family(process.pid)]
        peak = {"one": max([peak["one"], *sizes]), "all": max(peak["all"], sum(sizes))}
        time.sleep(0.1)
    require(process.returncode == 0, f"{' '.join(words)} failed")
    return {"seconds": time.monotonic() - start, **peak}


def family(pid: int) -> list[int]:
    """A process and all its descendants (on Linux)."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(member for child in children for member in family(int(child)))]


def anonymous(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1000


def size_of(data: Path, part: str) -> int:
    splits = read_manifest(data)["splits"]
    return sum(splits[split]["bytes"] for split in (["train"] if part == "tokenizer" else splits))


def same(one: Path, other: Path) -> bool:
    return sha256_file(one) == sha256_file(other)


def report(part: str, size: int, ours: list[dict], theirs: list[dict]) -> None:
    def line(name: str, runs: list[dict]) -> float:
        seconds = statistics.median(run["seconds"] for run in runs)
        one, everything = (max(run[key] for run in runs) for key in ("one", "all"))
        print(
            f"{part:<10} {name:<10} {size / 1e6 / seconds:6.1f} MB/s   {seconds:6.1f} s (median of {len(runs)})   "
            f"memory {one:,.0f} MB in one process, {everything:,.0f} MB in total",
            flush=True,
        )
        return seconds

    seconds = line("script", ours)
    if theirs:
        print(f"{part:<10} ratio      {line('usual way', theirs) / seconds:6.2f}; the results are identical")


# The usual ways


def train_the_usual_way(folder: Path, cores: int) -> None:
    import datasets
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    stories = datasets.load_from_disk(str(folder / "data" / "raw" / "train"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=2, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator((batch["text"] for batch in stories.iter(1_000)), trainer)
    tokenizer.save(str(folder / "usual_tokenizer"))


def pack_the_usual_way(folder: Path, cores: int) -> None:
    import datasets
    import numpy as np
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores
    datasets.disable_progress_bars()
    tokenizer = Tokenizer.from_file(str(folder / "data" / "tokenizer" / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    end = tokenizer.token_to_id("<|endoftext|>")
    cache = folder / "usual_cache"
    cache.mkdir(exist_ok=True)

    def encode(batch: dict) -> dict:
        ids = [[*encoding.ids, end] for encoding in tokenizer.encode_batch(batch["text"])]
        return {"ids": ids, "length": list(map(len, ids))}

    for split in ("validation", "train"):
        stories = datasets.load_from_disk(str(folder / "data" / "raw" / split))
        encoded = stories.map(
            encode, batched=True, num_proc=cores, remove_columns="text",
            load_from_cache_file=False, cache_file_name=str(cache / f"{split}.arrow"),
        )  # fmt: skip
        total = sum(batch["length"].sum() for batch in encoded.with_format("numpy", ["length"]).iter(10_000))
        packed = np.memmap(folder / "usual_packing", "<u2", "w+", shape=(total,))
        at = 0
        for table in encoded.select_columns("ids").with_format("arrow").iter(10_000):
            ids = table.column(0).combine_chunks().flatten().to_numpy()
            packed[at : at + len(ids)] = ids
            at += len(ids)
        packed.flush()
    shutil.rmtree(cache)


if __name__ == "__main__":
    run_script(main)
