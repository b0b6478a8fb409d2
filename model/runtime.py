"""Device, precision, compilation and processes; each automatic choice comes with its reason."""

import atexit
import ctypes
import os
import platform
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.gpt import GPT, Shortlist
from model.settings import REPO, UserError, first_line, require, warn

# Dense bfloat16 (float16 on the T4 and V100) peak in FLOP/s, from the vendors' data sheets
PEAK_FLOPS = {
    "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12, "T4": 65e12,
    "V100": 125e12, "RTX 5090": 209e12, "RTX 4090": 165e12, "RTX 4080": 97e12, "RTX 3090": 71e12,
}  # fmt: skip

# Tokens in one forward pass of an evaluation. A CPU is fastest while the logits stay in its caches.
CPU_TOKENS, GPU_TOKENS = 2_048, 65_536
GPU_LOGITS = 1 << 27  # 1.3 GB when held once in bfloat16 and twice in float32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Processes:
    """The processes that train together; just one without torchrun."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """The process that prints and writes."""
        return self.rank == 0


@dataclass
class Runtime:
    device: torch.device
    dtype: torch.dtype
    compile: bool  # becomes False if compilation fails
    reasons: str  # one line for people

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def start_processes(device: str) -> Processes:
    """Join torchrun's process group (nccl on CUDA, gloo elsewhere), if there is one."""
    if "RANK" not in os.environ:
        return Processes()
    processes = Processes(*(int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    if cuda:
        if processes.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"there are only {torch.cuda.device_count()} GPUs here: lower torchrun's --nproc_per_node to that"
            )
        torch.cuda.set_device(processes.local_rank)
    # torchrun keeps one store across restarts; the prefix hides the addresses of dead workers from new ones.
    store, rank, count = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    return processes


def stop_processes() -> None:
    """Leave the process group.

    While an error is on its way, the other processes may be in a collective operation, and leaving would wait for
    them: then this process just ends, once Python has printed the error.
    """
    kind = sys.exc_info()[0] or SystemExit
    if not dist.is_initialized():
        return
    if issubclass(kind, SystemExit):
        dist.destroy_process_group()
    else:
        atexit.register(end_at_once, 2 if issubclass(kind, UserError) else 1)


def end_at_once(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def wait_for_all(processes: Processes) -> None:
    if processes.count > 1:
        dist.barrier()


def same_everywhere(number: int, processes: Processes) -> bool:
    """Whether all processes have the same number."""
    if processes.count == 1:
        return True
    extremes = torch.tensor([number, -number])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    return extremes.sum().item() == 0


def total_over(value: Tensor, processes: Processes) -> float:
    """Sum of a scalar tensor over all processes."""
    if processes.count > 1:
        dist.all_reduce(value)
    return value.item()


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA, else Apple's MPS, else the CPU. Raises UserError if the device is not available."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
        if name == "cpu" and torch.version.cuda and Path("/proc/driver/nvidia/version").exists():
            warn(
                f"using the CPU: this PyTorch (CUDA {torch.version.cuda}) cannot use the GPU here, probably because "
                "its driver is older. Update the driver, or install a PyTorch build for an older CUDA"
            )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"there is no device {name!r}: choose auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                "this PyTorch finds no CUDA GPU: use --device cpu, or install a CUDA build and driver"
            )
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(
                f"there is no {name}: this machine has {torch.cuda.device_count()} GPUs, numbered from cuda:0"
            )
        device = torch.device("cuda", device.index or torch.cuda.current_device())
        major, minor = torch.cuda.get_device_capability(device)
        built_for = [arch[3:].rstrip("af") for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")]
        if 10 * major + minor < min(map(int, built_for), default=0):
            raise UserError(
                f"this PyTorch has no kernels for {torch.cuda.get_device_name(device)} (compute capability "
                f"{major}.{minor}): install a PyTorch build for an older CUDA, or use --device cpu"
            )
        torch.cuda.set_device(device)  # streams and graphs are created on the current device
        # With a mask, cuDNN's attention compiles a plan for every new shape, and some of its kernels give wrong
        # results: for lengths that are not multiples of 128, and perhaps in its backward pass on an H100.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("this PyTorch finds no MPS device: use --device cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {name!r} is not supported: choose auto, cpu, cuda, cuda:1 or mps")
    return device


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


def choose_dtype(device: torch.device, name: str) -> tuple[torch.dtype, str]:
    """The dtype of matrix products and activations, and the reason. Master weights are always float32."""
    if name != "auto":
        return DTYPES[name], "as requested"
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
    if device.type == "cpu":
        if not any(shutil.which(c) for c in ("g++", "clang++", "c++")):
            return False, "no C++ compiler here"
        if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
            return False, "no Python headers here (python3-dev)"
    return True, "the first step takes longer"


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
    """Choose precision and compilation from settings that may be auto."""
    dtype, dtype_reason = choose_dtype(device, dtype_setting)
    compiled, compile_reason = choose_compile(device, compile_setting)
    # So that the next run finds the compiled code; torch's default is a folder under /tmp.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(REPO / ".cache" / "inductor"))
    # On a CPU this costs nothing measurable; without it, compiled code adds the embedding's gradients in thread
    # order, and a run would not repeat bit for bit.
    if deterministic or device.type == "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # On CUDA a warning is not enough: attention would keep its non-deterministic kernels.
        torch.use_deterministic_algorithms(True, warn_only=device.type == "cpu")
        torch.utils.deterministic.fill_uninitialized_memory = False
    if device.type == "cpu":
        keep_freed_memory()
    reasons = (
        f"{device_name(device)}; {str(dtype).removeprefix('torch.')} ({dtype_reason}); "
        f"torch.compile {'on' if compiled else 'off'} ({compile_reason})"
    )
    return Runtime(device, dtype, compiled, reasons)


def peak_flops(device: torch.device) -> float | None:
    """The device's dense half-precision peak in FLOP/s, if known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name)), None)


def guess_micro_batch(model: GPT, runtime: Runtime) -> int:
    """Windows per forward pass: on a GPU what should fit in free memory, on a CPU what is fastest."""
    config = model.config
    tokens = 4_096
    if runtime.device.type == "cuda":
        bytes_per_token = 40 * config.n_layer * config.n_embd + 12 * config.vocab_size
        tokens = int(0.5 * torch.cuda.mem_get_info(runtime.device)[0] / bytes_per_token)
    return max(1, min(tokens, 131_072) // config.block_size)


def tokens_at_once(device: torch.device, logits_per_token: int) -> int:
    """Tokens in one forward pass of an evaluation that keeps so many logits for each."""
    return CPU_TOKENS if device.type == "cpu" else min(GPU_TOKENS, GPU_LOGITS // logits_per_token)


def ran_out_of_memory(error: Exception) -> bool:
    """Whether a GPU ran out of memory; the compiler and cuBLAS report this as other errors."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "ALLOC_FAILED" in text


def prepare_forward(
    model: GPT,
    runtime: Runtime,
    windows: int,
    processes: Processes,
    with_stories: bool,
    shortlist: Shortlist | None,
    wanted: int,
) -> tuple[nn.Module, int]:
    """The function (idx, targets, stories, shortlist) -> loss, compiled if possible, and the micro-batch in windows.

    With several processes, its backward pass averages their gradients. Runs it on each size of micro-batch (with any
    step's shortlist), so that failures come before the first step: if memory runs out, it halves the micro-batch; if
    compilation fails, it falls back to eager mode.
    """
    micro_batch = min(wanted or guess_micro_batch(model, runtime), windows)
    if not wanted:  # prefer slightly smaller but equal micro-batches, so that only one size is compiled
        fewest = -(-windows // micro_batch)
        count = next((n for n in range(fewest, 2 * fewest) if windows % n == 0), fewest)
        micro_batch = -(-windows // count)
    forward = model
    if runtime.compile:
        # On a CPU, dropout is faster with PyTorch's random numbers than with the compiler's, and as in eager mode.
        options = {"fallback_random": runtime.device.type == "cpu"}
        forward = torch.compile(model, dynamic=False, options=options)
    while True:
        sizes = {micro_batch, windows % micro_batch or micro_batch}  # the last of a step may be smaller
        try:
            for size in sizes:
                # sliced from longer rows like the windows of a step: other strides would trigger a recompilation
                rows = torch.zeros(size, model.config.block_size + 1, dtype=torch.long, device=runtime.device)
                inputs, targets = rows[:, :-1], rows[:, 1:]
                with runtime.autocast():
                    loss = forward(inputs, targets, inputs.int() if with_stories else None, shortlist)
                loss.backward()
        except Exception as error:  # compilation can fail in many ways; eager mode still works
            loss = None  # frees the memory held by the failed attempt
            if ran_out_of_memory(error):
                require(micro_batch > 1, "not even one window fits in the GPU's memory: use a smaller model")
                micro_batch //= 2
            elif forward is model:
                raise
            else:
                warn(f"torch.compile does not work here, continuing without it: {first_line(error)}")
                forward, runtime.compile = model, False
        else:
            break
        finally:
            model.zero_grad(set_to_none=True)
    if processes.count > 1:
        forward = DistributedDataParallel(forward, broadcast_buffers=False, gradient_as_bucket_view=True)
    return forward, micro_batch
