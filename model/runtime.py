"""Device, precision and compilation; each automatic choice comes with its reason."""

import contextlib
import ctypes
import importlib
import os
import platform
import re
import shutil
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from model.errors import UserError, require, warn
from model.files import count_text, lives, nearest_existing
from model.settings import REPO

# Dense bfloat16 (float16 on the T4 and V100) peak in FLOP/s, from the vendors' data sheets
PEAK_FLOPS = {
    "H200 NVL": 835e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12, "T4": 65e12, "V100": 125e12,
    "RTX 5090": 209e12, "RTX 4090": 165e12, "RTX 4080": 97e12, "RTX 3090": 71e12,
}  # fmt: skip

# For code that torch.compile makes, so that the next run finds it; PyTorch's default is a folder under /tmp.
COMPILED = REPO / ".cache" / "inductor"
# Tokens in one forward pass of an evaluation. A CPU is fastest while the logits stay in its caches.
CPU_TOKENS, GPU_TOKENS = 2_048, 65_536
GPU_LOGITS = 1 << 27  # 1.3 GB when held once in bfloat16 and twice in float32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Runtime:
    device: torch.device
    dtype: torch.dtype
    compile: bool  # becomes False if compilation fails
    description: str  # device, dtype and compilation, with the reasons

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def eager(self) -> contextlib.AbstractContextManager:
        """Run without compiled code: for a few batches, compiling takes longer than it saves."""
        return torch.compiler.set_stance("force_eager") if self.compile else contextlib.nullcontext()

    def compiling(self) -> contextlib.AbstractContextManager:
        """Around whatever compiles code; see marking()."""
        return marking(COMPILED) if self.compile else contextlib.nullcontext()


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA, else Apple's MPS, else the CPU. Raises UserError if the device is not available.

    A CUDA device becomes the current one.
    """
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
        if name == "cpu":
            warn_of_unused_gpu()
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"there is no device {name!r}: choose auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda":
        return usable_gpu(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("this PyTorch finds no MPS device: use --device cpu")
    require(
        device.type in ("cpu", "mps"),
        f"device {name!r} is not supported: choose auto, cpu, cuda, cuda:1 or mps",
    )
    return device


def warn_of_unused_gpu() -> None:
    """Say it if there is an NVIDIA GPU that this PyTorch cannot use."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")  # on purpose
    drivers = Path("/proc/driver/nvidia/version"), Path("/usr/lib/wsl/lib/libcuda.so.1")
    if hidden or not any(map(Path.exists, drivers)):
        return
    build, advice = "a build for CPUs", "delete .venv and run bash quickstart.sh"
    if torch.version.cuda:
        build = f"CUDA {torch.version.cuda}"
        advice = "its driver is probably older: update it, or install a PyTorch build for an older CUDA"
    warn(f"using the CPU: this PyTorch ({build}) cannot use the GPU here; {advice}")


def usable_gpu(device: torch.device) -> torch.device:
    """A CUDA device with its index, made the current one. Raises UserError if PyTorch cannot compute on it."""
    require(
        torch.cuda.is_available(),
        "this PyTorch finds no CUDA GPU: use --device cpu, or install a CUDA build and driver",
    )
    count = torch.cuda.device_count()
    require(
        (device.index or 0) < count,
        f"there is no {device}: this machine has {count} GPUs, numbered from cuda:0",
    )
    device = torch.device("cuda", device.index or torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    built_for = [arch[3:].rstrip("af") for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")]
    require(
        10 * major + minor >= min(map(int, built_for), default=0),
        f"this PyTorch has no kernels for {torch.cuda.get_device_name(device)} (compute capability {major}.{minor}): "
        "install a PyTorch build for an older CUDA, or use --device cpu",
    )
    torch.cuda.set_device(device)  # streams and graphs are created on the current device
    # With a mask, cuDNN's attention compiles a plan for every new shape, and some of its kernels give wrong results:
    # for lengths that are not multiples of 128, and perhaps in its backward pass on an H100.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def cpu_facts() -> dict[str, str]:
    """What Linux says of the first core, such as its `model name` and `flags`; elsewhere nothing."""
    if not (file := Path("/proc/cpuinfo")).exists():
        return {}
    first_core = file.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    pairs = (line.partition(":") for line in first_core.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    name = cpu_facts().get("model name") or platform.processor() or platform.machine()
    return f"{name}, {count_text(torch.get_num_threads(), 'thread', 'threads')}"


def hardware(device: torch.device) -> str:
    """What a micro-batch was chosen for: cpu, or a GPU's kind and name."""
    return "cpu" if device.type == "cpu" else f"{device.type}: {device_name(device)}"


def choose_dtype(device: torch.device, name: str) -> tuple[torch.dtype, str]:
    """The dtype of matrix products and activations, and the reason. Master weights are always float32."""
    if name != "auto":
        slow = device.type == "cpu" and name == "float16"
        return DTYPES[name], "as requested; slow on a CPU" if slow else "as requested"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "supported by this GPU"
        return torch.float16, "this GPU has no bfloat16; gradients are scaled"
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        unit = next((u for u in ("amx_bf16", "avx512_bf16") if found.get(u)), None)
        if unit:
            return torch.bfloat16, f"this CPU has {unit.upper().replace('_', '-')}"
        return torch.float32, "this CPU has no bfloat16 units"
    return torch.float32, "the safe choice on MPS"


def choose_compile(device: torch.device, name: str) -> tuple[bool, str]:
    """Whether to use torch.compile, and the reason."""
    if name != "auto":
        return name == "on", "as requested"
    if device.type == "mps":
        return False, "not on MPS"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        return False, "this GPU is too old"
    # what the compiler's back ends call: Inductor's C++ on a CPU, Triton's launchers in C on a GPU
    if not (cpp_compiler() if device.type == "cpu" else find_program(os.environ.get("CC"), "gcc", "clang")):
        return False, f"no {'C++' if device.type == 'cpu' else 'C'} compiler here"
    if device.type == "cpu" and re.search(r"\s", f"{compiled_folder()}{torch.__file__}"):
        return False, "a folder on its way has a space in its name, which PyTorch's compiler cannot take"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return False, "no Python headers here (python3-dev)"
    return True, "faster steps"


def find_program(*names: str | None) -> str | None:
    """The first of these programs that is installed."""
    return next((name for name in names if name and shutil.which(name)), None)


def cpp_compiler() -> str | None:
    return find_program(os.environ.get("CXX"), "g++", "clang++", "c++")


def compiled_folder() -> str | None:
    """Where compiled code is kept; None, if this repository cannot be written: in PyTorch's folder for it."""
    writable = os.access(nearest_existing(COMPILED), os.W_OK)
    return os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(COMPILED) if writable else None)


def compile_whole(function: Callable) -> Callable:
    # float32 is exact here on purpose, or the user's choice
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
    deterministic = torch.are_deterministic_algorithms_enabled()
    return torch.compile(function, dynamic=False, options={"deterministic": deterministic})


def keep_headers() -> None:
    """Keep the C++ headers that Inductor precompiles with the compiled code, if that is in this repository.

    Inductor has them in the temporary folder, where discard_unfinished() would not find one that was cut short.
    """
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") == str(COMPILED):
        codecache = importlib.import_module("torch._inductor.codecache")  # takes two seconds
        codecache._HEADER_DIR = str(COMPILED / "headers")
        codecache._HEADER_LOCK_DIR = str(COMPILED / "headers" / "locks")


def keep_freed_memory() -> None:
    """Keep freed memory for the next step instead of returning it to the system (Linux with glibc).

    Activations are large blocks, which glibc would otherwise map again each time: 100,000 page faults per step of
    stories-9m.
    """
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def choose_runtime(
    device: torch.device, dtype_setting: str, compile_setting: str, deterministic: bool = False
) -> Runtime:
    """Choose precision and compilation from settings that may be auto, and prepare PyTorch for them."""
    dtype, dtype_reason = choose_dtype(device, dtype_setting)
    compiled, compile_reason = choose_compile(device, compile_setting)
    configure_torch(device, deterministic)
    description = (
        f"{device_name(device)}; {str(dtype).removeprefix('torch.')} ({dtype_reason}); "
        f"torch.compile {'on' if compiled else 'off'} ({compile_reason})"
    )
    return Runtime(device, dtype, compiled, description)


def configure_torch(device: torch.device, deterministic: bool) -> None:
    """Set the folder of compiled code, which kernels are allowed, and what becomes of freed memory."""
    if folder := compiled_folder():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    if compiler := cpp_compiler():  # Inductor would look for one name only
        os.environ["CXX"] = compiler
    if not shutil.which("openssl"):  # which it needs for these
        os.environ["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"
    discard_unfinished(COMPILED)
    if device.type == "cpu":
        # This costs nothing measurable; without it, compiled code adds the embedding's gradients in thread order, and a
        # run would not repeat bit for bit. (use_deterministic_algorithms() would import the compiler: two seconds.)
        torch.set_deterministic_debug_mode("warn")
        keep_freed_memory()
    elif deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # A warning is not enough: attention would keep its non-deterministic kernels.
        torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False


@contextlib.contextmanager
def marking(folder: Path) -> Iterator[None]:
    """Mark the folder of compiled code while files are added to it. If the process is killed meanwhile, the mark stays:
    a file that was cut short would make all later compilations fail."""
    mark = folder / f"unfinished.{platform.node()}.{os.getpid()}"
    with contextlib.suppress(OSError):  # a folder that cannot be written gets no files either
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    try:
        yield
    except Exception:
        mark.unlink(missing_ok=True)
        raise
    else:  # not after Ctrl-C, which interrupts the C++ compiler, too
        mark.unlink(missing_ok=True)


def discard_unfinished(folder: Path) -> None:
    """Delete compiled code if a process was killed in marking(), unless another one is compiling now."""
    marks = list(folder.glob("unfinished.*"))
    if marks and not any(map(compiling_now, marks)):
        shutil.rmtree(folder, ignore_errors=True)


def compiling_now(mark: Path) -> bool:
    """Whether the process that set this mark may still live; one on another machine or in a container, for an hour."""
    name, _, process = mark.name.rpartition(".")
    if name == f"unfinished.{platform.node()}":
        return lives(int(process))
    return time.time() - mark.stat().st_mtime < 3600


def peak_flops(device: torch.device) -> float | None:
    """The device's dense half-precision peak in FLOP/s, if known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if re.search("Laptop|MIG", name):  # a slower variant, or a part of a GPU
        return None
    return next((peak for key, peak in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name)), None)


def tokens_at_once(device: torch.device, logits_per_token: int) -> int:
    """Tokens in one forward pass of an evaluation that keeps so many logits for each."""
    return CPU_TOKENS if device.type == "cpu" else min(GPU_TOKENS, GPU_LOGITS // logits_per_token)
