"""The forward pass of training: compiled if possible, with a micro-batch that fits in memory."""

import torch
from torch import nn

from model.errors import first_line, ran_out_of_memory, require, warn
from model.flex import flex_may_pay, judge_flex
from model.gpt import GPT
from model.run import Run
from model.runtime import Runtime, compile_whole, keep_headers


def guess_micro_batch(model: GPT, runtime: Runtime) -> int:
    """Windows per forward pass: on a GPU what should fit in free memory, on a CPU what is fastest."""
    config = model.config
    tokens = 4_096
    if runtime.device.type == "cuda":
        # an estimate: activations and their gradients in each layer, and a part of the logits
        bytes_per_token = 40 * config.n_layer * config.n_embd + 12 * config.vocab_size
        tokens = int(0.5 * torch.cuda.mem_get_info(runtime.device)[0] / bytes_per_token)
    tokens = min(tokens, 131_072, (2**31 - 1) // config.vocab_size)  # more logits would need 64-bit indices
    return max(1, tokens // config.block_size)


def equal_parts(windows: int, most: int) -> int:
    """The micro-batch for so many windows in each step, at most `most`: slightly smaller but equal ones are preferred,
    so that only one size is compiled."""
    fewest = -(-windows // most)
    count = next((n for n in range(fewest, 2 * fewest) if windows % n == 0), fewest)
    return -(-windows // count)


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
    fitting = guess_micro_batch(model, runtime)
    micro_batch = min(settings.micro_batch, most) or equal_parts(most, fitting)
    if model.flex is None:
        right, faster = judge_flex(run, min(fitting, settings.micro_batch or fitting))
    else:  # the choice that this run made before
        right = faster = model.flex and flex_may_pay(run)
    # right in all processes, and faster in the first, since they may measure different speeds
    model.flex = bool(processes.extremes(right)[0] and processes.extremes(faster and processes.first)[1])
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
