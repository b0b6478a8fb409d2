"""Where and how to compute: device, precision, compilation, processes. Each choice says its reason."""

import ctypes
import os
import platform
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.gpt import GPT
from model.settings import REPO, UserError, first_line

# Dense bfloat16 (float16 on the T4 and V100) peak in FLOP/s, from the makers' data sheets
PEAK_FLOPS = {
    "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12, "T4": 65e12,
    "V100": 125e12, "RTX 5090": 209e12, "RTX 4090": 165e12, "RTX 4080": 97e12, "RTX 3090": 71e12,
}  # fmt: skip

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Processes:
    """The processes that train together; one without torchrun."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """The process that prints and writes."""
        return self.rank == 0


@dataclass(frozen=True)
class Runtime:
    device: torch.device
    dtype: torch.dtype
    compile: bool
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
                f"{torch.cuda.device_count()} GPUs here: start torchrun with that --nproc_per_node or lower"
            )
        torch.cuda.set_device(processes.local_rank)
    # torchrun keeps one store over its restarts, in which a new worker must not find a dead one's address.
    store, rank, count = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    return processes


def stop_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


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
    """The sum over all processes of a number on the device."""
    if processes.count > 1:
        dist.all_reduce(value)
    return value.item()


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA, else Apple's MPS, else the CPU. Raises UserError where the device is not there."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
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
                f"there is no {name}: {torch.cuda.device_count()} GPUs are here, counted from cuda:0"
            )
        device = torch.device("cuda", device.index or torch.cuda.current_device())
        torch.cuda.set_device(device)  # streams and graphs are made on the current one
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
    """The precision of matrix products and activations, and why. Master weights are always float32."""
    if name != "auto":
        return DTYPES[name], "as asked"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "this GPU has it in hardware"
        return torch.float16, "this GPU has no bfloat16; gradients are scaled"
    if device.type == "cpu":
        found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        unit = next((u for u in ("amx_bf16", "avx512_bf16") if found.get(u)), None)
        if unit:
            return torch.bfloat16, f"this CPU has {unit.upper().replace('_', '-')}"
        return torch.float32, "this CPU has no bfloat16 units"
    return torch.float32, "the safe choice on MPS"


def choose_compile(device: torch.device, name: str) -> tuple[bool, str]:
    """Whether to torch.compile, and why."""
    if name != "auto":
        return name == "on", "as asked"
    if device.type == "mps":
        return False, "not on MPS"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        return False, "this GPU is too old for it"
    if device.type == "cpu":
        if not any(shutil.which(c) for c in ("g++", "clang++", "c++")):
            return False, "no C++ compiler here"
        if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
            return False, "no Python headers here (python3-dev)"
    return True, "the first step takes longer"


def keep_freed_memory() -> None:
    """Keep what a step frees for the next one, instead of giving it back to the system (Linux with glibc).

    Activations are large blocks, which glibc maps anew each time: 100,000 page faults in a step of stories-9m.
    """
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def choose_runtime(
    device_setting: str, dtype_setting: str, compile_setting: str, deterministic: bool = False
) -> Runtime:
    """Settle device, precision and compilation from settings that may say auto."""
    device = choose_device(device_setting)
    dtype, dtype_reason = choose_dtype(device, dtype_setting)
    compiled, compile_reason = choose_compile(device, compile_setting)
    # A compiled step is found again by the next run; torch's own default is a folder under /tmp.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(REPO / ".cache" / "inductor"))
    # On a CPU it costs nothing that can be measured, and without it compiled code adds the embedding's
    # gradients in whatever order the threads come: a run would not repeat itself to the last bit.
    if deterministic or device.type == "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype != torch.float32
    reasons = (
        f"{device_name(device)}; {str(dtype).removeprefix('torch.')} ({dtype_reason}); "
        f"torch.compile {'on' if compiled else 'off'} ({compile_reason})"
    )
    return Runtime(device, dtype, compiled, reasons)


def peak_flops(device: torch.device) -> float | None:
    """The device's dense half-precision peak in FLOP/s, where it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def guess_micro_batch(model: GPT, runtime: Runtime) -> int:
    """Windows that should fit: on a GPU by its free memory, on a CPU as many as still get faster."""
    config = model.config
    tokens = 4_096
    if runtime.device.type == "cuda":
        bytes_per_token = 40 * config.n_layer * config.n_embd + 12 * config.vocab_size
        tokens = int(0.5 * torch.cuda.mem_get_info(runtime.device)[0] / bytes_per_token)
    return max(1, min(tokens, 131_072) // config.block_size)


def prepare_forward(
    model: GPT, runtime: Runtime, wanted: int, windows: int, with_stories: bool = False
) -> tuple[nn.Module, int]:
    """The function (idx, targets, stories) -> loss, compiled where that works, and the windows it takes at once.

    Tries it, so that what fails does so before the first step: where memory runs out it takes half as
    many windows, where compilation fails it goes on without.
    """
    micro_batch = min(wanted or guess_micro_batch(model, runtime), windows)
    if not wanted:  # equal micro-batches, so that only one size is compiled
        micro_batch = -(-windows // -(-windows // micro_batch))
    forward = torch.compile(model, dynamic=False) if runtime.compile else model
    while True:
        # cut out of longer rows as the windows of a step are: other strides would be compiled once more
        rows = torch.zeros(micro_batch, model.config.block_size + 1, dtype=torch.long, device=runtime.device)
        try:
            with runtime.autocast():
                inputs, targets = rows[:, :-1], rows[:, 1:]
                loss = forward(inputs, targets, inputs.int() if with_stories else None)
            loss.backward()
        except torch.OutOfMemoryError:
            if micro_batch == 1:
                raise UserError(
                    "not even one window fits into the GPU's memory: use a smaller model"
                ) from None
            micro_batch //= 2
            loss = None  # lets go of what the attempt that failed holds
        except Exception as error:  # compilation has many ways to fail, and each leaves eager mode
            if forward is model:
                raise
            warn(f"torch.compile does not work here, going on without: {first_line(error)}")
            forward = model
        else:
            return forward, micro_batch
        finally:
            model.zero_grad(set_to_none=True)
