"""Reading data/raw, and what the three steps share."""

import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from model.files import command, read_json, shown
from model.settings import require

END_OF_TEXT = "<|endoftext|>"
SPLITS = ("train", "validation")
BATCH = 1_000  # stories handled at once, fewer where they are long: about
BATCH_BYTES = 1 << 23


class Progress(tqdm):
    """A progress bar with an ETA: from the first second on, and only where someone can see it."""

    stories = 0

    def __init__(self, disable: bool | None = None, **options: object):
        options |= {"delay": 1, "leave": False, "unit_scale": True, "dynamic_ncols": True}
        super().__init__(disable=disable, **options)

    def add(self, stories: int, size: int = 0) -> None:
        """Count stories, and the bytes they were read from, of a bar whose unit is bytes."""
        self.stories += stories
        self.set_postfix_str(f"{self.stories:,} stories", refresh=False)
        self.update(size)


def next_step(script: str, settings: SimpleNamespace) -> str:
    """The command to run next, as it would be typed here."""
    place = f" --data-dir {shlex.quote(shown(settings.data_dir))}" if "data_dir" in settings.given else ""
    return f"next: {command(script)}{place}"


def quiet_datasets(datasets: object) -> None:
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is raised too
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


# data/raw


def read_manifest(data_dir: Path) -> dict:
    """What step 1 wrote about data/raw. Raises UserError where there is nothing, or not that."""
    path, step = data_dir / "raw" / "manifest.json", command("data/ingestion.py")
    manifest = read_json(path)
    require(bool(manifest), f"no raw data yet in {shown(path.parent)}: run: {step}")
    try:
        whole = all({"stories", "bytes", "sha256"} <= set(manifest["splits"][split]) for split in SPLITS)
    except (KeyError, TypeError):
        whole = False
    require(whole, f"{shown(path)} is damaged: delete {shown(path.parent)} and run: {step}")
    return manifest


def open_raw(data_dir: Path, split: str, manifest: dict) -> object:
    """A split of data/raw as a memory-mapped datasets.Dataset with the one column "text"."""
    return open_split(data_dir / "raw" / split, manifest["splits"][split])


def open_split(folder: Path, counts: dict) -> object:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import datasets

    quiet_datasets(datasets)
    try:
        dataset = datasets.load_from_disk(str(folder))
        whole = len(dataset) == counts["stories"] and dataset.column_names == ["text"]
    except Exception:  # a missing or damaged file, each kind in its own exception
        whole = False
    require(
        whole, f"{shown(folder)} is damaged: delete {shown(folder.parent)} and run data/ingestion.py again"
    )
    return dataset


def raw_batches(dataset: object, bar: Progress | None = None) -> Iterator[list[str]]:
    """The stories of a split, in order, as lists; a bar of total dataset.data.nbytes goes along."""
    for table in dataset.with_format("arrow").iter(BATCH):
        for stories in slices(table):
            yield stories
            if bar is not None:
                bar.add(len(stories), table.nbytes * len(stories) / len(table))


def slices(table: object) -> Iterator[list]:
    """A table's first column as lists, shorter ones where its stories are long."""
    if len(table) > 1 and table.nbytes > BATCH_BYTES:
        middle = len(table) // 2
        yield from slices(table.slice(0, middle))
        yield from slices(table.slice(middle))
    elif len(table):
        yield table.column(0).to_pylist()
