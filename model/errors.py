"""Errors, warnings and notes of one line."""

import errno
import importlib
import re
import sys
import textwrap
from types import ModuleType

# Of the system, that the user can fix: a missing file, a full disk, a folder that is not writable
FILE_ERRORS = (
    "ENOENT ENOSPC ENOTDIR EISDIR EEXIST ENAMETOOLONG EDQUOT EFBIG EACCES EROFS EPERM ELOOP EBUSY".split()
)


class UserError(Exception):
    """An error that the user can fix. Its text is one line: what is wrong, and what to do."""


def require(condition: object, message: str) -> None:
    """Raise UserError(message) unless the condition is true."""
    if not condition:
        raise UserError(message)


def needs(package: str, purpose: str) -> ModuleType:
    """Import an optional package. Raises UserError with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.partition(".")[0]
        raise UserError(f"{purpose} needs the package {name}: run pip install {name}") from None


def first_line(error: Exception) -> str:
    """The first line of a library's error, short enough for a one-line message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "Output:" in lines:  # of a compiler, after its command
        lines = [line for line in lines[lines.index("Output:") + 1 :] if line.strip()] or lines
    heading = lines[0].rstrip().endswith(":")  # which says nothing by itself
    text = " ".join(lines[:2]) if heading else lines[0]
    if isinstance(error, KeyError):
        text = f"no entry {text}"
    return textwrap.shorten(text, 300, placeholder="...").rstrip(".")


def is_file_error(error: BaseException) -> bool:
    """Whether it is one of FILE_ERRORS, which run_script reports in one line."""
    return isinstance(error, OSError) and errno.errorcode.get(error.errno) in FILE_ERRORS


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU ran out of memory; the compiler and cuBLAS report this as other errors."""
    # Triton's word for a kernel that needs too much of a GPU's shared memory
    if "out of resource" in str(error):
        return False
    signs = r"(CUDA|HIP|MPS)\b.*out of memory|ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED"
    # torch.OutOfMemoryError by its name: this module is imported before torch
    return type(error).__name__ == "OutOfMemoryError" or re.search(signs, str(error)) is not None


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def note(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)
