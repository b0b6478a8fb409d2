"""The processes that train together, how they agree, and how they stop."""

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from model.errors import UserError, require
from model.script import explanation, leave_terminal


@dataclass(frozen=True)
class Processes:
    """The processes that train together; just one without torchrun."""

    rank: int = 0
    world_size: int = 1
    store: dist.Store | None = None  # what they share; it outlives restarts

    @property
    def first(self) -> bool:
        """The process that prints and writes."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a line, once for all processes."""
        if self.first:
            print(text, flush=True)

    def mark_begun(self) -> None:
        """Let `begun` be true from now on, also after torchrun has restarted the processes."""
        if self.store and self.first:
            self.store.set("begun", "")

    @property
    def begun(self) -> bool:
        return self.store is not None and self.store.check(["begun"])

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.extremes(0)

    def extremes(self, number: int) -> tuple[int, int]:
        """The smallest and the largest of the processes' numbers."""
        if self.world_size == 1:
            return number, number
        facts = torch.tensor([-number, number])  # on the CPU, to avoid waiting for the GPU
        dist.all_reduce(facts, op=dist.ReduceOp.MAX)
        return -int(facts[0]), int(facts[1])

    def total(self, value: Tensor) -> float:
        """Sum of a scalar tensor over all processes."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value.item()

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor's values by those of the first process: computed on other hardware, they may differ."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def all_reduce(self, gradients: list[Tensor]) -> None:
        """Sum each tensor over all processes, in place.

        All at once, after the backward pass: DistributedDataParallel arranges them anew after its first step, and the
        order of the additions with them, so that a resumed run of three processes would not repeat every bit.
        """
        if self.world_size > 1:
            together = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(together)
            parts = together.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])


def start_processes(device: str) -> Processes:
    """Join torchrun's process group (nccl on CUDA, gloo elsewhere), if there is one."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return Processes()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    require(
        world_size == 1 or not device.startswith("cuda:"),
        f"torchrun's processes take a GPU each: leave out --device {device} (CUDA_VISIBLE_DEVICES chooses among GPUs)",
    )
    shares_mps = world_size > 1 and device in ("auto", "mps") and torch.backends.mps.is_available()
    require(not shares_mps, "several processes cannot share this GPU: add --device cpu")
    cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    # of PyTorch's compiler: by default, each of our processes would start one for every core
    threads = max(1, min(32, os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))
    if cuda:
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"there are only {torch.cuda.device_count()} GPUs here: lower torchrun's --nproc_per_node to that"
            )
        torch.cuda.set_device(local_rank)
    # torchrun keeps one store across restarts; the prefix hides the addresses of dead workers from new ones.
    shared, _, _ = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", shared)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    # The others wait while the first evaluates and saves
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(hours=2)
    )
    return Processes(rank, world_size, dist.PrefixStore("ours", shared))


def stop_processes() -> None:
    """Leave the process group, and end this process as soon as Python has printed the error, if there is one.

    After an error, the group is not left: the other processes may be in a collective operation, and leaving would wait
    for them. And a thread of gloo's that frees a tensor after the interpreter has ended would abort the process.
    """
    error = sys.exc_info()[1]
    if not dist.is_initialized():
        return
    if error is None or isinstance(error, SystemExit):
        dist.destroy_process_group()
        status = error.code if error else 0
    else:
        signalled = {KeyboardInterrupt: 130, BrokenPipeError: 141}.get(type(error))
        status = signalled or (2 if explanation(error) else 1)
    atexit.register(end_at_once, status)


def end_at_once(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class StopRequest:
    """True after Ctrl-C, SIGTERM, a broken pipe or the end of the terminal (but not with nohup); the step is finished
    and saved. A second Ctrl-C stops at once."""

    def __init__(self, processes: Processes):
        self.received, self.agreed, self.processes = 0, 0, processes
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.receive)

    def __bool__(self) -> bool:
        return self.agreed != 0

    def receive(self, number: int, _frame: object = None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            leave_terminal()
        self.received = number
        if self.processes.world_size == 1:  # several processes stop together, in share()
            self.agreed = number
        if self.processes.first:
            again = "again " if number == signal.SIGINT else ""
            words = f"\nstopping after this step; press Ctrl-C {again}to stop at once\n"
            # Not print(): it may have been interrupted. And whoever reads this may be gone.
            with contextlib.suppress(OSError):
                os.write(sys.stderr.fileno(), words.encode())

    def share(self, seconds: float) -> float:
        """Let all processes know whether one is to stop; return the first one's training time. (That of the others
        may include waiting for the first while it evaluates and saves.)"""
        if self.processes.world_size > 1:
            facts = torch.tensor([self.received, seconds if self.processes.first else 0], dtype=torch.float64)
            dist.all_reduce(facts, op=dist.ReduceOp.MAX)
            self.agreed, seconds = int(facts[0]), float(facts[1])
        return seconds
