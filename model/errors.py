"""Errors of one line, and how a script ends with them."""

import errno
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Callable

# Of the system, that the user can fix: a missing file, a full disk, a folder that is not writable
FILE_ERRORS = "ENOENT ENOSPC ENOTDIR EISDIR EEXIST ENAMETOOLONG EDQUOT EFBIG EACCES EROFS EPERM".split()


class UserError(Exception):
    """An error that the user can fix. Its text is one line: what is wrong, and what to do."""


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def first_line(error: Exception) -> str:
    """The first line of a library's error, short enough for a one-line message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]  # a heading says nothing by itself
    return textwrap.shorten(text, 300, placeholder="...").rstrip(".")


def is_file_error(error: Exception) -> bool:
    """Whether it is one of FILE_ERRORS, which run_script reports in one line."""
    return isinstance(error, OSError) and errno.errorcode.get(error.errno) in FILE_ERRORS


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def stop_again(failure: object) -> None:
    """Re-send SIGINT/SIGTERM if its exception was raised inside a finalizer, where Python discards it."""
    again = {SystemExit: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}.get(failure.exc_type)
    if again:
        threading.Timer(0.01, signal.pthread_kill, [threading.main_thread().ident, again]).start()
    else:
        sys.__unraisablehook__(failure)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main(). Errors that the user can fix end in one line and exit status 2."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that cleanup code runs
    sys.unraisablehook = stop_again
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, such as `head`, is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if not is_file_error(error):
            raise
        message = f"cannot read or write {error.filename or 'a file'}: {error.strerror}"
    else:
        return
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
