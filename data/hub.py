"""Load data sets from the Hugging Face hub, with one-line errors."""

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from data.stories import BATCH, Progress, quiet_datasets, slices
from data.story_files import require_column
from model.files import require_space
from model.settings import UserError, first_line, require


def why_offline() -> str:
    """Return why the hub is unreachable, or "" if it is reachable.

    If not, switch the clients to offline mode; otherwise they would retry each file for 25 s. Cached files still load.
    """
    import huggingface_hub

    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    endpoint = huggingface_hub.constants.ENDPOINT
    reason = ""
    try:
        status = huggingface_hub.get_session().head(endpoint, timeout=10).status_code
        if status in (502, 503, 504):
            reason = f"{endpoint} is down (status {status})"
    except Exception as error:  # of the HTTP client, whose module varies between huggingface_hub releases
        reason = f"{endpoint} is unreachable ({first_line(error)})"
    if reason:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    return reason


def open_hub(word: str, column: str, stream: bool, folder: Path) -> dict[str, Iterator[str]]:
    """Open a hub data set, `name` or `name:config`, as {"train": stories, "validation": stories}.

    "validation" is missing if the data set has no such split. With `stream`, only what is read is downloaded;
    otherwise everything is, to the hub's cache, and `folder` must have space for it. Raises UserError on any failure.
    """
    import datasets

    name, _, config = word.partition(":")
    name_like = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
    # datasets treats "json" and the like as readers of files in the current folder
    reader = name in datasets.packaged_modules._PACKAGED_DATASETS_MODULES
    require(bool(name_like) and not reader, f"{word!r} is not a file, a folder or a data set on the hub")
    offline = why_offline()
    if offline:
        datasets.config.HF_HUB_OFFLINE = True
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 5  # 5 s apart
    quiet_datasets(datasets)
    with hub_errors(word, offline):
        splits = datasets.load_dataset(name, config or None, streaming=stream and not offline)
    require("train" in splits, f"{word} on the hub has no train split: it has {', '.join(splits)}")
    validation = next((split for split in ("validation", "valid", "val", "dev") if split in splits), None)
    chosen = {"train": "train"} | ({"validation": validation} if validation else {})
    stories, size = {}, 0
    for part, split in chosen.items():
        with hub_errors(word, offline):
            columns = splits[split].column_names or list(next(iter(splits[split]), {}))
        require_column(column, columns, f"{word} on the hub (split {split})")
        texts = splits[split].select_columns(column)
        size += 0 if stream else texts.data.nbytes
        stories[part] = hub_stories(texts, word, offline)
    require_space(folder, size)
    return stories


def hub_stories(split: object, word: str, offline: str) -> Iterator[str]:
    import datasets
    import pyarrow

    total = split.data.nbytes if isinstance(split, datasets.Dataset) else None  # unknown when streaming
    with hub_errors(word, offline), Progress(total=total, unit="B", desc=word) as bar:
        for table in split.with_format("arrow").iter(BATCH):
            kind = table.schema[0].type
            text = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
            require(text, f"{word} on the hub: column {table.schema[0].name!r} holds {kind}, not text")
            bar.add(table.num_rows, table.nbytes)
            for stories in slices(table):
                yield from (story or "" for story in stories)


@contextlib.contextmanager
def hub_errors(word: str, offline: str) -> Iterator[None]:
    """Turn whatever the hub's clients raise into a one-line UserError."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        instead = "use --source sample (the built-in stories, no network needed) or give your own files"
        if offline:
            raise UserError(f"cannot load {word} from the hub: {offline}; {instead}") from None
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
            raise  # such as a full disk
        raise UserError(f"cannot load {word} from the hub: {first_line(error)}; or {instead}") from None
