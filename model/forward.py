"""The forward pass of training: compiled if possible, with a micro-batch that fits in memory."""

import math
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.attention import story_mask
from model.errors import first_line, ran_out_of_memory, require, warn
from model.gpt import GPT, Attention, rotary_tables
from model.run import Run
from model.runtime import Runtime, keep_headers

FLEX_BLOCK = 128  # flex_attention skips blocks of so many queries and keys, so a longer context can gain
FLEX_TOKENS, FLEX_LAYERS = 65_536, 4  # in the trial of flex_attention, whose mask serves all layers


def guess_micro_batch(model: GPT, runtime: Runtime) -> int:
    """Windows per forward pass: on a GPU what should fit in free memory, on a CPU what is fastest."""
    config = model.config
    tokens = 4_096
    if runtime.device.type == "cuda":
        bytes_per_token = 40 * config.n_layer * config.n_embd + 12 * config.vocab_size
        tokens = int(0.5 * torch.cuda.mem_get_info(runtime.device)[0] / bytes_per_token)
    return max(1, min(tokens, 131_072) // config.block_size)


def equal_parts(windows: int, most: int) -> int:
    """The micro-batch for so many windows in each step, at most `most`: slightly smaller but equal ones are preferred,
    so that only one size is compiled."""
    fewest = -(-windows // most)
    count = next((n for n in range(fewest, 2 * fewest) if windows % n == 0), fewest)
    return -(-windows // count)


def flex_may_pay(run: Run) -> bool:
    """Whether flex_attention should be tried: it skips what the story mask hides, a quarter of a context of 256 and
    half or more of a longer one.

    It has no dropout, and its kernels for older GPUs are slow.
    """
    device, config = run.runtime.device, run.config
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    fits = run.runtime.compile and run.runtime.dtype == torch.bfloat16 and not config.dropout
    return able and fits and run.recipe.mask_stories and config.block_size > FLEX_BLOCK


def try_flex(run: Run, windows: int) -> tuple[bool, float]:
    """Whether flex_attention, compiled, gives the output and gradients of plain attention here, in one random layer,
    and how many times as fast as plain attention, compiled, it is in a few.

    Some versions of PyTorch computed wrong gradients for some shapes and GPUs without a word.
    """
    config, runtime, device = run.config, run.runtime, run.runtime.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        layer = Attention(config).to(device).eval()
        x = torch.randn(windows, config.block_size, config.n_embd, device=device, requires_grad=True)
        stories = (torch.rand(x.shape[:2], device=device) < 0.01).cumsum(1, dtype=torch.int32)
        upstream = torch.randn(x.shape, device=device, dtype=runtime.dtype)
        rotary = None
        if config.blocks == "modern":
            rotary = tuple(table.to(device) for table in rotary_tables(config))

        def attend(x: Tensor, layers: int, flex: bool) -> Tensor:
            mask = story_mask(stories, flex)
            for _ in range(layers):
                x = layer(x, rotary, mask)
            return x

        compiled = compile_whole(attend)

        def pass_through(function: Callable, layers: int, flex: bool) -> list[Tensor]:
            with runtime.autocast():
                y = function(x, layers, flex)
            return [y, *torch.autograd.grad(y, [x, *layer.parameters()], upstream)]

        def seconds(flex: bool) -> float:
            started = time.perf_counter()
            for _ in range(10):
                last = pass_through(compiled, FLEX_LAYERS, flex)[-1]
            last.sum().item()  # waits for the GPU
            return time.perf_counter() - started

        flex, plain = pass_through(compiled, 1, True), pass_through(attend, 1, False)
        pairs = ((a.float(), b.float()) for a, b in zip(flex, plain, strict=True))
        right = all((a - b).norm() <= 0.05 * b.norm() for a, b in pairs)
        if not right or torch.are_deterministic_algorithms_enabled():  # a measurement must not decide
            return right, math.inf
        rounds = [(seconds(True), seconds(False)) for _ in range(4)][1:]  # the first compiles
    flex_seconds, plain_seconds = map(min, zip(*rounds, strict=True))
    return right, plain_seconds / flex_seconds


def choose_flex(run: Run, micro_batch: int) -> bool:
    """Whether compiled code should mask stories by flex_attention."""
    if not flex_may_pay(run):
        return False
    try:
        with run.runtime.compiling():
            right, speedup = try_flex(run, max(1, min(micro_batch, FLEX_TOKENS // run.config.block_size)))
        if right:
            return speedup > 1
        reason = "its results are wrong here"
    except torch.AcceleratorError:  # after that, nothing works
        raise
    except Exception as error:  # its compilation can fail in many ways
        reason = first_line(error)
    warn(f"FlexAttention does not work here ({reason}), continuing with slower attention")
    torch.compiler.reset()
    return False


def compile_whole(function: Callable) -> Callable:
    # float32 is exact here on purpose, or the user's choice
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
    deterministic = torch.are_deterministic_algorithms_enabled()
    return torch.compile(function, dynamic=False, options={"deterministic": deterministic})


def compile_model(model: GPT) -> nn.Module:
    """The model, to be compiled when it is first called.

    On a CPU its parts are compiled one by one: as the blocks are alike, one compilation serves all of them, and those
    that join late. That takes a fraction of the time, and the code is about as fast (benchmarks/RESULTS.md).
    """
    if model.head_weight.device.type != "cpu":
        return compile_whole(model)
    keep_headers()
    for part in (*model.blocks, model.norm, model.cross_entropy):
        # dropout is faster with PyTorch's random numbers than with the compiler's, and as in eager mode
        part.compile(dynamic=False, options={"deterministic": True, "fallback_random": True})
    return model


def prepare_forward(run: Run, model: GPT, windows: int) -> nn.Module:
    """The function (idx, targets, story_ids, shortlist) -> loss, compiled if possible, for a process that has so many
    windows in each step.

    Runs it on each size of micro-batch, so that failures come before the first step: if memory runs out, it halves the
    micro-batch; if compilation fails, it falls back to eager mode. What works is set in run.settings.micro_batch (the
    same in all processes), run.runtime.compile and model.flex.
    """
    settings, runtime, processes = run.settings, run.runtime, run.processes
    _, most = processes.extremes(windows)
    micro_batch = min(settings.micro_batch, most) or equal_parts(most, guess_micro_batch(model, runtime))
    # used if all processes choose it, or chose it before and still can
    flex = choose_flex(run, micro_batch) if model.flex is None else model.flex and flex_may_pay(run)
    model.flex = bool(processes.extremes(flex)[0])
    forward = compile_model(model) if runtime.compile else model
    agreed = False
    while not agreed:
        last = windows % micro_batch or micro_batch  # the last of a step may be smaller
        try:
            with runtime.compiling():
                for size in {min(micro_batch, windows), last}:
                    try_out(run, forward, size)
        except Exception as error:  # compilation can fail in many ways; eager mode still works
            if ran_out_of_memory(error):
                require(micro_batch > 1, "not even one window fits in the GPU's memory: use a smaller model")
                micro_batch //= 2
                torch.compiler.reset()  # code for other sizes counts towards a limit, beyond which nothing is compiled
            # After an AcceleratorError, nothing works
            elif not runtime.compile or isinstance(error, torch.AcceleratorError):
                raise
            elif model.flex:
                warn(f"FlexAttention does not work here, continuing without it: {first_line(error)}")
                model.flex = False
            else:
                warn(f"torch.compile does not work here, continuing without it: {first_line(error)}")
                torch.compiler.set_stance("force_eager")
                runtime.compile = False
        else:
            micro_batch, largest = processes.extremes(micro_batch)
            agreed = micro_batch == largest
        finally:
            model.zero_grad(set_to_none=True)
    settings.micro_batch = micro_batch
    return forward


def try_out(run: Run, forward: nn.Module, size: int) -> None:
    """A forward and a backward pass over a micro-batch of so many windows."""
    # sliced from longer rows like the windows of a step: other strides would trigger a recompilation
    rows = torch.zeros(size, run.config.block_size + 1, dtype=torch.long, device=run.runtime.device)
    inputs, targets, story_ids = run.inputs_and_targets(rows)
    with run.runtime.autocast():
        loss = forward(inputs, targets, story_ids, run.shortlist(0))  # any step's shortlist would do
    loss.backward()
