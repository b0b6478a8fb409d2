"""Load data sets from the Hugging Face hub, with one-line errors."""

from collections.abc import Iterator
from pathlib import Path

from data.raw_stories import BATCH, Progress, quiet_datasets, slices
from data.story_files import require_column
from model.errors import require
from model.files import require_space
from model.hub import HUB_NAME, hub_errors, why_offline

INSTEAD = "use --source sample (the built-in stories, no network needed) or give your own files"


def open_hub(word: str, column: str, stream: bool, folder: Path) -> dict[str, Iterator[str]]:
    """Open a hub data set, `name` or `name:config`, as {"train": stories, "validation": stories}.

    "validation" is missing if the data set has no such split. With `stream`, only what is read is downloaded;
    otherwise everything is, to the hub's cache, and `folder` must have space for it. Raises UserError on any failure.
    """
    import datasets

    name, _, config = word.partition(":")
    # datasets treats "json" and the like as readers of files in the current folder
    reader = name in datasets.packaged_modules._PACKAGED_DATASETS_MODULES
    require(
        HUB_NAME.fullmatch(name) and not reader, f"{word!r} is not a file, a folder or a data set on the hub"
    )
    offline = why_offline()
    if offline:
        datasets.config.HF_HUB_OFFLINE = True
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 5  # 5 s apart
    quiet_datasets(datasets)
    what = word if "/" in word else f"{word} (no file or folder here)"  # perhaps it is a misspelt one
    with hub_errors(what, INSTEAD):
        splits = datasets.load_dataset(name, config or None, streaming=stream and not offline)
    require("train" in splits, f"{word} on the hub has no train split: it has {', '.join(splits)}")
    validation = next((split for split in ("validation", "valid", "val", "dev") if split in splits), None)
    chosen = {"train": "train"} | ({"validation": validation} if validation else {})
    stories, size = {}, 0
    for part, split in chosen.items():
        with hub_errors(word, INSTEAD):
            columns = splits[split].column_names or list(next(iter(splits[split]), {}))
        require_column(column, columns, f"{word} on the hub (split {split})")
        texts = splits[split].select_columns(column)
        size += 0 if stream else texts.data.nbytes
        stories[part] = hub_stories(texts, word)
    require_space(folder, size)
    return stories


def hub_stories(split: object, word: str) -> Iterator[str]:
    import datasets
    import pyarrow

    total = split.data.nbytes if isinstance(split, datasets.Dataset) else None  # unknown when streaming
    with hub_errors(word, INSTEAD), Progress(total=total, unit="B", desc=word) as bar:
        for table in split.with_format("arrow").iter(BATCH):
            kind = table.schema[0].type
            text = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
            require(text, f"{word} on the hub: column {table.schema[0].name!r} holds {kind}, not text")
            bar.add(table.num_rows, table.nbytes)
            for stories in slices(table):
                yield from (story or "" for story in stories)
