"""Data sets of the Hugging Face hub, and what can go wrong on the way there."""

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from data.stories import BATCH, Progress, quiet_datasets, slices
from data.story_files import require_column
from model.files import require_space
from model.settings import UserError, first_line, require


def reach_hub() -> str:
    """Why the hub cannot be reached, "" where it can; from then on its clients do not try again.

    They would retry each file for 25 s before they give up. What is in the hub's cache still loads.
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
            reason = f"{endpoint} is out of order (status {status})"
    except Exception as error:  # of the HTTP client, whose module changes between releases of the hub's
        reason = f"{endpoint} does not answer ({first_line(error)})"
    if reason:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    return reason


def open_hub(word: str, column: str, stream: bool, folder: Path) -> dict[str, Iterator[str]]:
    """The stories of a hub data set, `name` or `name:config`, as {"train": ..., "validation": ...}.

    "validation" is absent where the data set has no such split. With `stream` only what is read is downloaded,
    else everything, to the hub's cache; the stories are to be written into the folder.
    Raises UserError for whatever goes wrong.
    """
    import datasets

    name, _, config = word.partition(":")
    name_like = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
    reader = (
        name in datasets.packaged_modules._PACKAGED_DATASETS_MODULES
    )  # "json" would read the current folder
    require(bool(name_like) and not reader, f"{word!r} is neither a file, a folder nor a data set on the hub")
    offline = reach_hub()
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
        require_column(column, columns, f"{word} on the hub, split {split},")
        texts = splits[split].select_columns(column)
        size += 0 if stream else texts.data.nbytes
        stories[part] = hub_stories(texts, word, offline)
    require_space(folder, size)
    return stories


def hub_stories(split: object, word: str, offline: str) -> Iterator[str]:
    import datasets
    import pyarrow

    total = split.data.nbytes if isinstance(split, datasets.Dataset) else None  # unknown of a stream
    with hub_errors(word, offline), Progress(total=total, unit="B", desc=word) as bar:
        for table in split.with_format("arrow").iter(BATCH):
            kind = table.schema[0].type
            text = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
            require(text, f"{word} on the hub: column {table.schema[0].name!r} is not text but {kind}")
            bar.add(table.num_rows, table.nbytes)
            for stories in slices(table):
                yield from (story or "" for story in stories)


@contextlib.contextmanager
def hub_errors(word: str, offline: str) -> Iterator[None]:
    """Whatever the hub's clients raise, as one line."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        instead = "use --source sample (the built-in stories, no network needed) or name files of your own"
        if offline:
            raise UserError(f"cannot load {word} from the hub, {offline}: {instead}") from None
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
            raise  # such as a full disk
        raise UserError(f"cannot load {word} from the hub: {first_line(error)}; or {instead}") from None
