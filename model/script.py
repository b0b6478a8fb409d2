"""How every script starts and ends. To be imported before torch, whose import takes seconds."""

import importlib.util
import io
import logging
import os
import re
import shlex
import signal
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from model.errors import UserError, is_file_error, ran_out_of_memory
from model.settings import REPO, read_constants

LESS = "ask for less (a smaller batch or model, fewer or shorter stories)"


def fail(message: str) -> NoReturn:
    """End with an error that the user can fix, in one line."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


if os.name == "nt":
    fail("on Windows, use WSL: run wsl --install, and this repository in there")
if not all(map(importlib.util.find_spec, ("torch", "numpy", "tokenizers", "tqdm"))):
    activate, requirements = REPO / ".venv/bin/activate", REPO / "requirements.txt"
    get = f"pip install -r {shlex.quote(str(requirements))}"
    if activate.exists() and Path(sys.prefix).resolve() != (REPO / ".venv").resolve():
        get = f"source {shlex.quote(str(activate))}"
    fail(f"{sys.executable} is a Python without the packages: run {get}")

# Keep idle OpenMP threads from spinning for long, so that a shared CPU stays usable; torch reads it when imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# It would warn of a home that cannot be written, where it only has to look for fonts again.
logging.getLogger("matplotlib").setLevel(logging.ERROR)

# Until run_script() takes over, let Ctrl-C end a script of ours without a traceback, and likewise settings that Python
# itself would stumble over, such as a word without quotes.
started = getattr(sys.modules["__main__"], "__file__", None)  # None in an interactive session
if started and Path(started).resolve().parent in (REPO, REPO / "data", REPO / "benchmarks"):
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        read_constants(started)
    except UserError as error:
        fail(str(error))


def stop_again(failure: object) -> None:
    """Re-send SIGINT/SIGTERM if its exception was raised inside a finalizer, where Python discards it."""
    again = {SystemExit: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}.get(failure.exc_type)
    if again:
        threading.Timer(0.1, signal.pthread_kill, [threading.main_thread().ident, again]).start()
    else:
        sys.__unraisablehook__(failure)


def close_output() -> None:
    """Discard what is still printed; otherwise, Python would complain at its end that nobody reads it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave_terminal() -> None:
    """Discard what is still printed to a terminal, which is gone; what goes into files stays."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        if stat.S_ISCHR(os.fstat(output).st_mode):
            os.dup2(nowhere, output)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main(). Errors that the user can fix end in one line and exit status 2."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that cleanup code runs
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.unraisablehook = stop_again
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack some of a story's characters
    try:
        main()
        sys.stdout.flush()
    except SystemExit:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            close_output()
        raise
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, such as `head`, is gone
        close_output()
        sys.exit(141)
    except Exception as error:
        message = explanation(error)
        if not message:
            raise
        fail(message)


def explanation(error: BaseException) -> str:
    """What to print about an error that the user can fix; "" for any other."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    on_gpu = ran_out_of_memory(error)
    if on_gpu or isinstance(error, MemoryError) or "can't allocate memory" in text:
        asked = re.search(r"allocate ([\d.]+ \w+)", text)  # as PyTorch and numpy say it
        where, instead = ("GPU memory", ", or --device cpu") if on_gpu else ("memory", "")
        at_once = f" for {asked[1]} at once" if asked else ""
        return f"not enough {where}{at_once}: {LESS}{instead}"
    if is_file_error(error):
        return f"cannot read or write {error.filename or 'a file, or the output'}: {error.strerror}"
    return ""
