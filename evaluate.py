"""Step 6: how well does a model predict unseen stories, and what are its own stories like?

python evaluate.py                                             the latest checkpoint, all validation stories
python evaluate.py --checkpoint best runs/b/best.pt            side by side, with the difference's confidence interval
python evaluate.py --checkpoint best roneneldan/TinyStories-33M    against any Hugging Face causal model
python evaluate.py --text my_stories.txt                       on your own stories
python evaluate.py --num-stories 100                           do its stories end, repeat themselves, copy?
python evaluate.py --stories stories.jsonl                     the same for stories written by generate.py
python evaluate.py --checkpoint best latest --report checkpoints/report.html

Each story is scored alone, including its end-of-text token; a story longer than the context is scored with a
window that slides by half of the context. Compare bits per byte: loss per token and perplexity depend on the
tokenizer. Intervals are 95 %, by bootstrap over stories.
"""

import hashlib
import itertools
import platform
import shlex
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

from model.script import run_script  # before torch: see there

# isort: split
from data.story_files import find_files, read_file, story_per, tidy
from model.candidates import (
    MAX_TOKENS,
    Candidate,
    files_of,
    find_candidate,
    import_transformers,
    load_candidate,
)
from model.errors import UserError, note, require
from model.files import count_text, file_to_write, shown, size_text, write_json, write_text
from model.packed_data import Data, data_files, fingerprints, load_data, real_stories, spread
from model.report import print_scores, print_table, quality_table, render
from model.runtime import Runtime, choose_device, choose_runtime
from model.scoring import Scores, bootstrap, compare, score_stories
from model.settings import flag_name, read_settings, require_seed, require_within
from model.story_quality import Story, describe, read_written
from model.tokenizer import readable

CHECKPOINT: list[str] = []  # files, folders, "best", "latest", steps or Hugging Face models; default: latest
CHECKPOINT_DIR: str = "checkpoints"  # where to look for best, latest and steps
DATA_DIR: str = "data"  # folder with tokenizer/ and processed/
SPLIT: str = "validation"  # train, validation or all
TEXT: list[str] = []  # score the stories in these files instead: formats as in step 1 (.txt, .jsonl, ...)
TEXT_COLUMN: str = "text"  # column or key of the story in .csv, .json, .jsonl and .parquet files
STORY_PER_LINE: bool = False  # each line of a .txt file is a story
STORY_PER_FILE: bool = False  # each .txt file is a story
MAX_SAMPLES: int = 0  # stories to score, evenly spread; 0 is all
BATCH_SIZE: int = 0  # windows per forward pass; 0 packs as many tokens as suit the device
NUM_STORIES: int | None = None  # stories each model writes; None: 100 for a report, one per --prompt
STORIES: list[str] = []  # .jsonl files written by generate.py, whose stories are judged too
PROMPT: list[str] = [
    "Once upon a time, there was a little",
    "One day, a boy named Tim",
    "Lily and her mom went to the",
    "The big dog was sad because",
    "In the forest there lived a",
    "Tom had a red ball. He",
    '"Can you help me?" asked the',
    "It was raining, and Sara",
    "There once was an old",
    "Ben wanted to be brave, but",
]  # prompts for the written stories; if given on the command line, the first story of each is printed
OUTPUT: str | None = None  # write the results to this .json file
REPORT: str | None = None  # write a page of tables, curves and stories to this .html file
SEED: int = 1337  # for the stories and the bootstrap
DEVICE: str = "auto"  # auto, cpu, cuda, cuda:1 or mps
DTYPE: str = "float32"  # of scoring: float32, or perhaps faster: bfloat16, float16, auto (as in training)

# Stories each checkpoint writes for a report
REPORT_STORIES = 100


def main() -> None:
    settings = read_settings(
        __file__,
        choices={
            "split": ("train", "validation", "all"),
            "dtype": ("auto", "float32", "bfloat16", "float16"),
        },
        aliases={"model": "checkpoint", "max-stories": "max-samples", "out-dir": "checkpoint-dir"},
    )
    prepare_settings(settings)
    files = {name: read_written(name) for name in settings.stories}
    # judging stories in files needs no model, unless other flags ask for one
    of_models = {"num_stories", "prompt", "text", "split", "max_samples"}
    needed = not files or settings.text or settings.given & of_models
    names = settings.checkpoint or ([None] if needed else [])
    found = [find_candidate(settings.checkpoint_dir, name) for name in names]
    texts = find_texts(settings)
    read = [
        *texts,
        *settings.stories,
        *data_files(settings.data_dir),
        *itertools.chain(*map(files_of, found)),
    ]
    for name in ("output", "report"):
        setattr(settings, name, file_to_write(getattr(settings, name), f"--{name}", read))
    outputs = [path.resolve() for path in (settings.output, settings.report) if path]
    require(len({*outputs}) == len(outputs), "--output and --report name the same file: each needs its own")
    data = read_data(settings)
    stories, source = read_stories(settings, data, texts)
    notes = Notes()
    if data and data.outdated and not settings.text:
        notes.add(data.outdated)
    runtime = choose_runtime(choose_device(settings.device), settings.dtype, "off")

    for name in found:
        if isinstance(name, str):  # if transformers is missing, say it before other models are scored
            import_transformers(name)

    results, scores, written = [], [], {}
    for name in found:
        candidate = load_candidate(name, runtime.device)
        if data and (settings.num_stories or not settings.text):
            note_other_stories(candidate, settings, data, notes)
        result, score = examine(candidate, stories, runtime, settings.batch_size)
        results.append(result)
        scores.append(score)
        if settings.num_stories:
            written[candidate.name] = write(candidate, settings, notes)
            result["stories_written_in"] = candidate.written_in
        del candidate  # free its memory for the next one
    if results and len(stories) > 1:
        compare(results, bootstrap(scores, settings.seed))
    elif results:
        notes.add("one story alone gives no interval, and no verdict")
    report = {
        **describe_run(settings, runtime, stories, source, data),
        "notes": notes,
        "results": results,
        "quality": judge(written | files, stories, data),
        "written": side_by_side(written, settings.prompt),
    }
    show(report, settings)


def examine(
    candidate: Candidate, stories: list[str], runtime: Runtime, batch_size: int
) -> tuple[dict, Scores]:
    """Score the stories: what the report says of this candidate, and the scores."""
    started = time.perf_counter()
    candidate.adapt_to(stories)
    scores = score_stories(candidate, stories, runtime, batch_size)
    result = {
        **candidate.facts,
        **scores.summary(),
        "seconds": round(time.perf_counter() - started, 2),
        "by_position": scores.by_position(),
        "settings": candidate.settings,
        "curve": candidate.curve,
    }
    return result, scores


class Notes(list):
    """What a reader of the figures should know; it is printed, and in the report."""

    def add(self, text: str) -> None:
        note(text)
        self.append(text)


def write(candidate: Candidate, settings: SimpleNamespace, notes: Notes) -> list[Story]:
    """Let the candidate continue the prompts in turn, num_stories times in all."""
    if candidate.block_size < MAX_TOKENS and candidate.stops_at_context:
        notes.add(
            f"{candidate.name} writes no more than its context of {candidate.block_size} tokens, the "
            f"checkpoints of this project up to {MAX_TOKENS}: figures that depend on length do not compare"
        )
    prompts = [settings.prompt[k % len(settings.prompt)] for k in range(settings.num_stories)]
    return candidate.write(prompts, settings.seed)


def prepare_settings(settings: SimpleNamespace) -> None:
    """Complete and check the settings. Raises UserError before any long work starts."""
    require_within(settings, max_samples="[0, inf)", batch_size="[0, inf)", num_stories="[0, inf)")
    require_seed(settings.seed)
    settings.story_per = story_per(settings.story_per_line, settings.story_per_file)
    settings.prompt = list(map(readable, settings.prompt)) or [""]
    if settings.num_stories is None:
        printed = len(settings.prompt) if "prompt" in settings.given else 0
        settings.num_stories = max(printed, REPORT_STORIES if settings.report else 0)
    require(
        "prompt" not in settings.given or settings.num_stories >= len(settings.prompt),
        f"--num-stories must be at least {len(settings.prompt)}, the number of prompts",
    )
    last_seed = settings.seed + max(0, settings.num_stories - 1)
    require(last_seed < 2**63, f"--seed {settings.seed} is too large for {settings.num_stories:,} stories")
    require(not (settings.text and "split" in settings.given), "--text and --split: give one of the two")
    without = sorted(settings.given & {"text_column", "story_per_line", "story_per_file"})
    require(
        settings.text or not without, f"{' and '.join(map(flag_name, without))}: only for files of --text"
    )


def read_data(settings: SimpleNamespace) -> Data | None:
    """The packed stories, or None if there are none and --text makes them unnecessary."""
    try:
        return load_data(settings.data_dir)
    except UserError:
        if settings.text and "data_dir" not in settings.given:
            return None
        raise


def read_stories(settings: SimpleNamespace, data: Data | None, texts: list[Path]) -> tuple[list[str], str]:
    """The stories to score, and a description of them."""
    if texts:
        stories = read_texts(settings, texts)
        names = readable(", ".join(settings.text))
        return stories, f"{count_text(len(stories), 'story', 'stories')} of {names}"
    splits = {"train": [data.train], "validation": [data.validation], "all": [data.train, data.validation]}
    stories = real_stories(splits[settings.split], data, settings.max_samples)
    require(stories, f"there are no {settings.split} stories in {shown(settings.data_dir)}")
    kind = "training and validation" if settings.split == "all" else settings.split
    # sorted, so that no result depends on the order in the file
    return sorted(stories), count_text(len(stories), f"{kind} story", f"{kind} stories")


def find_texts(settings: SimpleNamespace) -> list[Path]:
    """The files that --text names, by themselves, their folder or a pattern."""
    texts = []
    for word in settings.text:
        files = find_files(word, settings.data_dir)
        require(files is not None, f"there is no file or folder {word}")
        texts += [file.resolve() for file in files]
    return list(dict.fromkeys(texts))  # one that is named twice counts once


def read_texts(settings: SimpleNamespace, texts: list[Path]) -> list[str]:
    stories = []
    for file in texts:
        stories += map(tidy, read_file(file, settings.text_column, story_per=settings.story_per))
    stories = [story for story in stories if story]
    require(stories, f"{', '.join(settings.text)} holds no stories")
    return sorted(spread(stories, settings.max_samples))


def note_other_stories(candidate: Candidate, settings: SimpleNamespace, data: Data, notes: Notes) -> None:
    """Note it if the model has been trained on other stories than those in the folder."""
    trained_on, here = candidate.facts.get("trained_on") or {}, fingerprints(data)
    if trained_on and trained_on != here:
        same = trained_on["tokenizer"] == here["tokenizer"]
        doubt = "some of the stories scored here may be among its own"
        if settings.text:
            doubt = "what it copies is looked up in those all the same"
        notes.add(
            f"{candidate.name} was trained "
            f"{'on other stories than those' if same else 'with another tokenizer than the one'} in "
            f"{shown(settings.data_dir)} (--data-dir takes another folder); {doubt}"
        )
    elif trained_on and (origin := candidate.settings.get("init_from")):
        notes.add(
            f"{candidate.name} was fine-tuned from {readable(origin)}, which may have seen the stories scored here"
        )


def judge(groups: dict[str, list[Story]], stories: list[str], data: Data | None) -> dict[str, dict]:
    """Quality figures of the written stories, and of as many real validation stories."""
    if not groups:
        return {}
    count = max(map(len, groups.values()))
    real = real_stories([data.validation], data, count) if data else spread(stories, count)
    figures = describe({"real stories": [Story(text) for text in real], **groups}, data)
    if data is None:
        return figures
    for name in groups:
        for figure in ("copied_8grams", "mean_longest_copy"):
            excess = figures[name][figure] - figures["real stories"][figure]
            figures[name][figure + "_beyond_real"] = excess
    return figures


def side_by_side(written: dict[str, list[Story]], prompts: list[str]) -> list[dict]:
    """The first story of each checkpoint for each prompt."""
    return [
        {"prompt": prompt, "stories": {name: stories[k].text for name, stories in written.items()}}
        for k, prompt in enumerate(prompts)
        if written and k < min(map(len, written.values()))
    ]


def describe_run(
    settings: SimpleNamespace, runtime: Runtime, stories: list[str], source: str, data: Data | None
) -> dict:
    """Everything needed to repeat the run: command, versions, fingerprints."""
    digest = hashlib.sha256("\0".join(stories).encode())
    used = [name for name in ("torch", "numpy", "tokenizers", "transformers") if name in sys.modules]
    versions = {name: sys.modules[name].__version__ for name in used}
    return {
        "command": readable(shlex.join(["python", *sys.argv])),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **versions},
        "device": runtime.description,
        "seed": settings.seed,
        "source": source,
        "stories_sha256": digest.hexdigest(),
        "data": fingerprints(data) if data else None,
    }


def show(report: dict, settings: SimpleNamespace) -> None:
    """Write the requested files, and print the results, even if that fails."""
    try:  # first, since what reads the output may close it
        if settings.output is not None:
            write_json(settings.output, report)
        if settings.report is not None:
            write_text(settings.report, render(report))
    finally:
        print_results(report, settings)
    for what, path in (("results", settings.output), ("report", settings.report)):
        if path is not None:
            print(f"{what} written to {shown(path)}")


def print_results(report: dict, settings: SimpleNamespace) -> None:
    if "prompt" in settings.given:
        for row in report["written"]:
            for name, story in row["stories"].items():
                print(f"{name}: {story}\n")
    results = report["results"]
    if results:
        print(f"{report['source']}, {size_text(results[0]['bytes'])}")
        print_scores(results)
    if report["quality"]:
        print()
        print_table(quality_table(report["quality"]))


if __name__ == "__main__":
    run_script(main)
