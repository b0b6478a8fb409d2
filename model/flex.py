"""Whether FlexAttention, which skips what the story mask hides, is right and faster on this GPU."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from model.attention import story_mask
from model.errors import first_line, warn
from model.gpt import Attention, rotary_tables
from model.run import Run
from model.runtime import compile_whole

BLOCK = 128  # it skips blocks of so many queries and keys, so a longer context can gain
TOKENS, LAYERS = 65_536, 4  # in the trial: the mask of a micro-batch serves all layers


def flex_may_pay(run: Run) -> bool:
    """Whether flex_attention should be tried: it skips what the story mask hides, a quarter of a context of 256 and
    half or more of a longer one.

    It has no dropout, and its kernels for older GPUs are slow.
    """
    device, config = run.runtime.device, run.config
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    fits = run.runtime.compile and run.runtime.dtype == torch.bfloat16 and not config.attention_dropout
    return able and fits and run.recipe.mask_stories and config.block_size > BLOCK


def try_flex(run: Run, windows: int) -> tuple[bool, bool]:
    """Whether flex_attention, compiled, gives the output and gradients of plain attention here, in one random layer,
    and whether it is faster than plain attention, compiled, in a few.

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
                last = pass_through(compiled, LAYERS, flex)[-1]
            last.sum().item()  # waits for the GPU
            return time.perf_counter() - started

        flex, plain = pass_through(compiled, 1, True), pass_through(attend, 1, False)
        pairs = ((a.float(), b.float()) for a, b in zip(flex, plain, strict=True))
        right = all((a - b).norm() <= 0.05 * b.norm() for a, b in pairs)
        if not right or torch.are_deterministic_algorithms_enabled():  # a measurement must not decide
            return right, right
        rounds = [(seconds(True), seconds(False)) for _ in range(4)][1:]  # the first compiles
    flex_seconds, plain_seconds = map(min, zip(*rounds, strict=True))
    return right, flex_seconds < plain_seconds


def judge_flex(run: Run, micro_batch: int) -> tuple[bool, bool]:
    """Whether flex_attention gives the right results here, and whether it is faster for micro-batches of so many
    windows; neither, if it need not be tried."""
    if not flex_may_pay(run):
        return False, False
    try:
        with run.runtime.compiling():
            right, faster = try_flex(run, max(1, min(micro_batch, TOKENS // run.config.block_size)))
        if right:
            return True, faster
        reason = "its results are wrong here"
    except torch.AcceleratorError:  # after that, nothing works
        raise
    except Exception as error:  # its compilation can fail in many ways
        reason = first_line(error)
    warn(f"FlexAttention does not work here ({reason}), continuing with slower attention")
    torch.compiler.reset()
    return False, False
