"""Reach the Hugging Face hub, or say in one line why not."""

import contextlib
import functools
import re
import sys
from collections.abc import Iterator

from model.errors import UserError, first_line, is_file_error

# Of a model or a data set
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@functools.cache
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


@contextlib.contextmanager
def hub_errors(what: str, instead: str) -> Iterator[None]:
    """Turn whatever the hub's clients raise into a one-line UserError, with what to do instead."""
    offline = why_offline()
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if is_file_error(error) and not offline:
            raise  # such as a full disk
        reason = offline or first_line(error)
        raise UserError(f"cannot load {what} from the hub: {reason}; {instead}") from None
