"""Read and write data/raw, and helpers that the three steps share."""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from model.errors import require
from model.files import command, read_json, shown

SPLITS = ("train", "validation")
BATCH = 1_000  # stories per batch
BATCH_BYTES = 1 << 23  # approximate limit: long stories make smaller batches


class Progress(tqdm):
    """A progress bar with an ETA, shown after one second and only on a terminal."""

    stories = 0

    def __init__(self, disable: bool | None = None, **options: object):
        options |= {"delay": 1, "leave": False, "unit_scale": True, "dynamic_ncols": True}
        super().__init__(disable=disable, **options)

    def add(self, stories: int, size: int = 0) -> None:
        """Count stories, and the bytes they came from if the bar's unit is bytes."""
        self.stories += stories
        self.set_postfix_str(f"{self.stories:,} stories", refresh=False)
        self.update(size)


def quiet_datasets(datasets: object) -> None:
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are raised as well
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


# data/raw


def read_manifest(data_dir: Path) -> dict:
    """The manifest that step 1 wrote. Raises UserError if it is missing or damaged."""
    path, step = data_dir / "raw" / "manifest.json", command("data/ingestion.py", data_dir=data_dir)
    manifest = read_json(path)
    require(manifest, f"no raw data yet in {shown(path.parent)}: run {step}")
    try:
        whole = all({"stories", "bytes", "sha256"} <= set(manifest["splits"][split]) for split in SPLITS)
    except (KeyError, TypeError):
        whole = False
    require(whole, f"{shown(path)} is damaged: delete {shown(path.parent)} and run {step}")
    return manifest


def open_split(raw: Path, split: str, splits: dict) -> object:
    """A split of data/raw as a memory-mapped datasets.Dataset with one column, "text"."""
    import datasets

    quiet_datasets(datasets)
    try:
        dataset = datasets.load_from_disk(str(raw / split))
        whole = len(dataset) == splits[split]["stories"] and dataset.column_names == ["text"]
    except Exception:  # missing or damaged files raise various exceptions
        whole = False
    again = command("data/ingestion.py", data_dir=raw.parent)
    require(whole, f"{shown(raw / split)} is damaged: delete {shown(raw)} and run {again} again")
    return dataset


def raw_batches(dataset: object, bar: Progress | None = None) -> Iterator[list[str]]:
    """The stories of a split, in order, as lists; advances `bar`, whose total is dataset.data.nbytes."""
    for table in dataset.with_format("arrow").iter(BATCH):
        for stories in slices(table):
            yield stories
            if bar is not None:
                bar.add(len(stories), table.nbytes * len(stories) / len(table))


def slices(table: object) -> Iterator[list]:
    """A table's first column as lists, shorter ones if its stories are long."""
    if len(table) > 1 and table.nbytes > BATCH_BYTES:
        middle = len(table) // 2
        yield from slices(table.slice(0, middle))
        yield from slices(table.slice(middle))
    elif len(table):
        yield table.column(0).to_pylist()


def story_digest(story: str) -> bytes:
    return hashlib.blake2b(story.encode(), digest_size=16).digest()


def write_split(folder: Path, stories: Iterable[str], bar: Progress | None = None) -> dict:
    """Write stories as a datasets folder; return their number, UTF-8 bytes and a digest of all."""
    import datasets

    quiet_datasets(datasets)
    datasets.disable_progress_bars()
    features = datasets.Features({"text": datasets.Value("string")})
    datasets.Dataset.from_dict({"text": [""]}, features).save_to_disk(str(folder))
    (table,) = folder.glob("*.arrow")  # overwritten with the stories, so nothing is copied
    return write_arrow(table, stories, bar)


def write_arrow(path: Path, stories: Iterable[str], bar: Progress | None = None) -> dict:
    """Write stories as an Arrow stream, in batches, so that memory use does not grow with them."""
    import pyarrow

    schema = pyarrow.schema([("text", pyarrow.string())])
    digest = hashlib.sha256()
    counts = {"stories": 0, "bytes": 0}
    with path.open("wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        for batch in batches(stories):
            writer.write_batch(pyarrow.record_batch([pyarrow.array(batch, pyarrow.string())], schema))
            for story in batch:
                digest.update(story_digest(story))
            counts["stories"] += len(batch)
            counts["bytes"] += sum(len(story.encode()) for story in batch)
            if bar is not None:
                bar.add(len(batch))
    return {**counts, "sha256": digest.hexdigest()}


def batches(stories: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for story in stories:
        batch.append(story)
        size += len(story)
        if len(batch) == BATCH or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
