"""The kernels of decoding on a CPU (kernels.c and its headers), compiled by the machine's C compiler when first needed.

PyTorch's operations take some 5 microseconds each, and a token of a small model needs some 150: about as much time as
its weights take to arrive from memory, or more.
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import math
import mmap
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.errors import first_line
from model.files import atomic_write
from model.runtime import cpu_facts
from model.settings import REPO

if TYPE_CHECKING:
    from model.decoder import DecoderBlock, KVCache

SOURCE = Path(__file__).with_suffix(".c")
CACHE = REPO / ".cache" / "kernels"
# For this processor; clang before version 16 takes -march=native on x86 only
NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
# The last two let compilers vectorise more; no result changes.
FLAGS = ("-O3", NATIVE, "-fPIC", "-fno-math-errno", "-fno-trapping-math")
# First with threads, from the OpenMP library that PyTorch has loaded; if the compiler wants another one, without.
OPENMP = ("-fopenmp", "-fopenmp-simd")
# Keys lie in blocks of so many positions, or half as many
POSITIONS = 16
CACHE_LINE = 64  # bytes
# As in kernels.h
PREPARATIONS = ("nothing", "rms_norm", "layer_norm", "swiglu", "gelu")


class Kernels(NamedTuple):
    library: ctypes.PyDLL | None
    shortcoming: str  # why there are none, or why they are slower than they could be; else empty


@functools.cache
def load() -> Kernels:
    """The kernels, compiled at the first call."""
    commands = [os.environ.get("CC", "").split(), ["gcc"], ["clang"], ["cc"]]
    compiler = next((words for words in commands if words and shutil.which(words[0])), None)
    if compiler is None:
        return Kernels(None, "no C compiler here")
    for openmp in OPENMP:
        try:
            # not CDLL, which would let Python's other threads run meanwhile, and use the scratch memory at once
            library = ctypes.PyDLL(str(compiled([*compiler, *FLAGS, openmp])))
        except subprocess.CalledProcessError as error:
            reason = f"{compiler[0]}: {first_line(error.stderr.strip() or f'exit status {error.returncode}')}"
        except OSError as error:
            reason = first_line(error)
        else:
            pointer, integer, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
            library.decode.argtypes = [pointer, integer, pointer, real, *[pointer] * 4, *[integer] * 3]
            library.write_tokens.argtypes = [*library.decode.argtypes, pointer, pointer]
            library.sample.argtypes = [pointer, integer, integer, pointer, pointer, pointer]
            library.decode.restype = library.sample.restype = None
            library.decode_memory.argtypes = [ctypes.c_size_t, *[integer] * 4]
            library.decode_memory.restype = ctypes.c_size_t
            return Kernels(library, f"one thread only with {compiler[0]}" if openmp == OPENMP[1] else "")
    return Kernels(None, reason)


def compiled(command: list[str]) -> Path:
    """The path of the shared library that `command` makes of SOURCE and its headers, for this CPU."""
    code = [path.read_text(encoding="utf-8") for path in sorted(SOURCE.parent.glob("*.[ch]"))]
    facts = [*command, *processor(), *code]
    path = CACHE / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        try:
            build(command, path)
        except OSError:  # this folder cannot be written
            path = Path(temporary_folder()) / path.name
            build(command, path)
    return path


def build(command: list[str], path: Path) -> None:
    with atomic_write(path) as temporary:
        part = temporary.with_name(f".{path.name}.o.{os.getpid()}.tmp")
        # In two steps: linking with -fopenmp would load a second OpenMP library, with threads of its own.
        linking = [word for word in command if word not in (*FLAGS, *OPENMP)]
        steps = [*command, "-c", SOURCE, "-o", part], [*linking, "-shared", part, "-o", temporary]
        try:
            for step in steps:
                subprocess.run(step, check=True, capture_output=True, text=True)
        finally:
            part.unlink(missing_ok=True)


@functools.cache
def temporary_folder() -> str:
    """A folder that is removed when Python ends."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def processor() -> list[str]:
    """What tells this machine's CPU from others, for which code may have been compiled in the same folder."""
    facts = cpu_facts()
    known = [facts[name] for name in ("model name", "flags", "Features") if name in facts]
    return [platform.machine(), platform.processor(), *(known or [platform.node()])]


def block_rows() -> int:
    """The rows of weights in each of the blocks that kernels.c describes."""
    return ctypes.c_int.in_dll(load().library, "block_rows").value


class PackedLinear(ctypes.Structure):
    """decoder.FusedLinear as kernels.c reads it, with weights in float32, or in int8 with one scale per row.

    With int8 weights, each row of inputs is rounded to int8, too.
    """

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weights", "scales", "bias")),
        *((name, ctypes.c_int) for name in ("outputs", "inputs", "prepare")),
    )

    def __init__(self, weight: Tensor, bias: Tensor | None, prepare: str, int8: bool):
        scales, (rows, columns) = None, weight.shape
        if int8:
            scales = (weight.abs().amax(1) / 127).clamp(min=1e-30)
            weight = (weight / scales[:, None]).round().to(torch.int8)
        block, together = block_rows(), 4 if int8 else 1  # columns
        weight = F.pad(weight, (0, -columns % together, 0, -rows % block))
        weight = weight.unflatten(1, (-1, together)).unflatten(0, (-1, block)).transpose(1, 2)
        self.tensors = weight.contiguous(), scales, bias  # the structure has their addresses only
        super().__init__(*map(address, self.tensors), rows, columns, PREPARATIONS.index(prepare))

    def move(self, memory: Tensor) -> Tensor:
        """Move the weights to the beginning of this memory (bytes); returns the rest."""
        weights, scales, bias = self.tensors
        place, rest = memory[: weights.nbytes], memory[whole(weights.nbytes, CACHE_LINE) :]
        self.tensors = place.view(weights.dtype).view(weights.shape).copy_(weights), scales, bias
        self.weights = place.data_ptr()
        return rest


class PackedBlock(ctypes.Structure):
    """decoder.DecoderBlock as kernels.c reads it."""

    _fields_ = (
        *((name, PackedLinear) for name in ("qkv", "project", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "keys", "values")),
    )

    def __init__(self, block: "DecoderBlock"):
        matrices = block.qkv, block.project, block.up, block.down
        cos, sin = (None, None) if block.rotary is None else block.rotary
        super().__init__(*matrices, address(cos), address(sin))


class Shape(ctypes.Structure):
    """What a step is about, as kernels.c reads it."""

    _fields_ = [
        (name, ctypes.c_int) for name in "batch new start heads size capacity positions narrow".split()
    ]


class Filters(ctypes.Structure):
    """How a token is drawn: from the `count` likeliest, after temperature, top-k (0: off), top-p and min-p."""

    MOST = 512  # the largest count: kernels.c sorts by insertion
    _fields_ = (
        *((name, ctypes.c_int) for name in ("count", "top_k")),
        *((name, ctypes.c_float) for name in ("temperature", "top_p", "min_p")),
    )


class Sequences(ctypes.Structure):
    """Sequences that Network.write() continues, as kernels.c reads them."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in "embedding places tokens lengths uniforms".split()),
        *((name, ctypes.c_int) for name in "total draws position steps".split()),
    )


class Network:
    """All blocks and the head of a decoder: embeddings (B, T, C), which it overwrites, -> logits (B, V).

    write() also takes the steps that follow, with the embeddings and the sampling between them.

    Threads wait for each other some forty times per token. Where other programs compute, too, that may take longer
    than one thread needs alone, so now and then both are timed, if there are few sequences; with many, a step takes so
    long that waiting hardly matters. The number of threads changes no bit of the result.
    """

    FEW = 8
    # Steps in a call of write_tokens(), at most, and the seconds that they may take: stories are to appear word by word
    STEPS, BURST = 8, 0.03
    TRIAL, PERIOD = 8, 256  # steps with each number of threads, and steps until the next trial
    SLOWER = 1.1  # the most by which one slow call raises the estimate for its number of threads

    def __init__(
        self,
        blocks: "list[DecoderBlock]",
        head: PackedLinear,
        eps: float,
        embedding: Tensor,
        position_embedding: Tensor | None,
    ):
        matrices = [part for block in blocks for part in block if isinstance(part, PackedLinear)]
        memory = huge_pages(sum(whole(matrix.tensors[0].nbytes, CACHE_LINE) for matrix in (*matrices, head)))
        for matrix in (*matrices, head):
            memory = matrix.move(memory)
        self.parts = blocks, head  # which keep the tensors
        self.embedding = embedding.contiguous()
        self.position_embedding = None if position_embedding is None else position_embedding.contiguous()
        self.blocks = (PackedBlock * len(blocks))(*map(PackedBlock, blocks))
        self.head, self.eps, rotary = head, eps, blocks[0].rotary
        self.positions = 0 if rotary is None else rotary.size(-2)
        self.deepest = max(matrix.inputs for matrix in (*matrices, head))
        self.widest = max(matrix.outputs for matrix in matrices)
        self.scratch = torch.empty(0)
        # since the latest trial of threads: steps, and seconds of a step by the number of threads
        self.steps, self.seconds = 0, {}
        self.latest = math.inf  # seconds of the latest step

    def __call__(self, x: Tensor, cache: "KVCache") -> Tensor:
        return self.call(load().library.decode, x, cache, 1)[1]

    def write(
        self,
        cache: "KVCache",
        tokens: Tensor,
        lengths: Tensor,
        uniforms: Tensor,
        position: int,
        most: int,
        filters: Filters,
    ) -> tuple[int, Tensor | None]:
        """Write the tokens (B, total) from `position` on: up to `most`, of which the cache has room for all.

        Sequence b keeps its prompt, up to lengths[b], and draws each other token with a number from its row of
        `uniforms`. Returns how many were written, and the logits (B, V) of the next ones if one of them cannot be drawn
        from the filters' `count` likeliest tokens, otherwise None.
        """
        steps = max(1, min(most, self.STEPS, int(self.BURST / self.latest)))
        if len(tokens) <= self.FEW and self.choose_threads() not in self.seconds:
            steps = 1  # that number of threads may turn out to be far slower
        tables = address(self.embedding), address(self.position_embedding)
        pointers = *tables, tokens.data_ptr(), lengths.data_ptr(), uniforms.data_ptr()
        sequences = Sequences(*pointers, tokens.size(1), uniforms.size(1), position, steps)
        x = self.embedding.new_empty(len(tokens), 1, self.embedding.size(1))
        structures = ctypes.byref(sequences), ctypes.byref(filters)
        done, logits = self.call(load().library.write_tokens, x, cache, steps, *structures)
        return done, None if done == steps else logits

    def call(
        self, function: Callable, x: Tensor, cache: "KVCache", steps: int, *more: object
    ) -> tuple[int | None, Tensor]:
        """Call decode() or write_tokens(), for so many steps at most; return its result and the logits of the last."""
        (batch, new, width), (sequences, heads, capacity, size) = x.shape, cache.k[0].shape
        end = cache.length + new * steps
        if batch != sequences or end > min(cache.capacity, self.positions or cache.capacity):
            raise ValueError(f"{batch} sequences of {end} tokens do not fit the cache or the context")
        for block, keys, values in zip(self.blocks, cache.k, cache.v, strict=True):
            block.keys, block.values = keys.data_ptr(), values.data_ptr()
        timed = new == 1 and batch <= self.FEW
        threads = self.choose_threads() if timed else torch.get_num_threads()
        needed = load().library.decode_memory(batch * new, self.deepest, self.widest, width, heads * size)
        if len(self.scratch) < needed:
            self.scratch = x.new_empty(needed)
        logits = x.new_empty(batch, self.head.outputs)
        pointers = ctypes.addressof(self.head), self.eps, x.data_ptr(), logits.data_ptr()
        narrow = cache.k[0].dtype == torch.bfloat16
        shape = Shape(batch, new, cache.length, heads, size, capacity, self.positions, narrow)
        scratch = self.scratch.data_ptr(), self.deepest, self.widest
        started = time.perf_counter()
        result = function(
            self.blocks, len(self.blocks), *pointers, ctypes.byref(shape), *scratch, threads, *more
        )
        taken = max(1, shape.start - cache.length)  # steps
        if new == 1:
            self.latest = max(1e-9, time.perf_counter() - started) / taken
        if timed:
            before = self.seconds.get(threads, math.inf)
            self.seconds[threads] = min(self.latest, self.SLOWER * before)
            self.steps += taken
        return result, logits

    def choose_threads(self) -> int:
        """All threads, then one (once only, if that is much slower), then whichever is faster."""
        every = torch.get_num_threads()
        if self.steps >= self.PERIOD or every not in self.seconds:
            self.steps, self.seconds = 0, {}
        if self.steps < self.TRIAL:
            return every
        if self.steps < 2 * self.TRIAL and self.seconds.get(1, 0) < 2 * self.seconds[every]:
            return 1
        return min(self.seconds, key=self.seconds.get)


def sample(logits: Tensor, filters: Filters, uniforms: Tensor) -> Tensor:
    """The next tokens (B,) for logits (B, V), drawn with one uniform number in [0, 1) per row; -1 in rows where more
    than the filters' `count` likeliest may pass them."""
    logits, uniforms = logits.contiguous(), uniforms.contiguous()
    tokens = torch.empty(len(logits), dtype=torch.long)
    pointers = ctypes.byref(filters), uniforms.data_ptr(), tokens.data_ptr()
    load().library.sample(logits.data_ptr(), *logits.shape, *pointers)
    return tokens


def huge_pages(size: int) -> Tensor:
    """Zeros (size,), uint8, in huge pages where the system has them, which saves TLB misses."""
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        raise MemoryError(f"cannot allocate {size} bytes") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # Linux may be built without
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def whole(count: int, of: int) -> int:
    """The next multiple of `of`."""
    return -(-count // of) * of


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
