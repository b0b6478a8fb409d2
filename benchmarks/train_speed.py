"""Training speed of train.py next to plain PyTorch loops around transformers' models of the same shape.

python benchmarks/train_speed.py                          on data/, preset stories-9m
python benchmarks/train_speed.py --seconds 60 --rounds 5  a quieter median

Each arm runs in its own process; the arms take turns in every round, so that a busy machine affects all of them. A
peer reads random windows of the same tokens, with train.py's tokens per step and micro-batch, and uses fused AdamW
and gradient clipping. The first round fills the compile caches. Needs requirements-test.txt.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F

from model.config import PRESETS, GPTConfig
from model.errors import UserError, needs
from model.gpt import GPT
from model.packed_data import load_data
from model.runtime import choose_device, peak_flops
from model.script import run_script
from model.settings import REPO, read_settings

PRESET: str = "stories-9m"  # model shape, by name from model/config.py
DEVICE: str = "auto"  # auto, cpu, cuda or mps
SECONDS: float = 20.0  # seconds of training per arm and round
ROUNDS: int = 3  # rounds; each arm runs once per round
BATCH_TOKENS: int = 0  # tokens per optimizer step; 0: 4,096 on a CPU, else the preset's
MICRO_BATCH: int = 0  # windows per forward pass, for all arms; 0: 16 on a CPU, else what makes 65,536 tokens
ARMS: list[str] = []  # run only these (part of a name is enough)
DATA_DIR: str = "data"  # folder with tokenizer/ and processed/
PEER: str = ""  # name of an arm to run in this process (used when the script calls itself)

PEERS = [
    f"{model} {dtype}{compiled}"
    for model in ("GPT2LMHeadModel", "Qwen3ForCausalLM")
    for dtype in ("float32", "bfloat16")
    for compiled in ("", " compiled")
]
# The second runs as on a CPU without bfloat16 units
OURS = ["train.py", "train.py float32"]


def main() -> None:
    settings = read_settings(__file__, choices={"preset": tuple(PRESETS)})
    data = load_data(settings.data_dir)
    config = dataclasses.replace(PRESETS[settings.preset].config, vocab_size=data.vocab_size)
    device = choose_device(settings.device)
    batch = settings.batch_tokens or (
        4_096 if device.type == "cpu" else PRESETS[settings.preset].recipe.batch_tokens
    )
    settings.windows = max(1, batch // config.block_size)
    suitable = 16 if device.type == "cpu" else max(1, 65_536 // config.block_size)
    settings.micro_batch = min(settings.micro_batch or suitable, settings.windows)
    if settings.peer:
        return run_peer(settings.peer, settings, config, device, data.train.tokens)
    arms = [a for a in [*OURS, *PEERS] if not settings.arms or any(part in a for part in settings.arms)]
    if not arms:
        raise UserError(f"--arms matches none of: {', '.join([*OURS, *PEERS])}")
    if set(arms) & set(PEERS):
        needs("transformers", "a peer")
    results = {arm: [] for arm in arms}
    for turn in range(settings.rounds):
        for arm in arms:
            with tempfile.TemporaryDirectory() as folder:
                results[arm].append(run_arm(Path(folder), arm, settings, config.block_size))
            speed, first = results[arm][-1]["speed"], results[arm][-1]["first"]
            print(
                f"round {turn + 1}  {arm:32s} {speed:10,.0f} tokens/s, first step after {first:.1f} s",
                flush=True,
            )
    print_table(results, GPT(config).flops_per_token(), device)


def run_arm(folder: Path, arm: str, settings: SimpleNamespace, block_size: int) -> dict[str, float]:
    """Run one arm in its own process: median tokens/s, seconds to the first step, peak memory in GB."""
    common = [
        "--device",
        settings.device,
        "--data-dir",
        settings.data_dir,
        "--micro-batch",
        settings.micro_batch,
    ]
    common += ["--preset", settings.preset, "--batch-tokens", settings.windows * block_size]
    if arm in OURS:
        command = [
            REPO / "train.py",
            *common,
            "--checkpoint-dir",
            folder,
            "--max-minutes",
            settings.seconds / 60,
        ]
        command += ["--eval-interval", 10**9, "--eval-tokens", 1, "--sample-tokens", 0, "--log-interval", 1]
        # like the peers: all layers throughout, and the whole vocabulary
        command += ["--grow-at", 0, "--no-sampled-softmax"]
        command += ["--dtype", "float32"] if arm.endswith("float32") else []
    else:
        command = [__file__, *common, "--peer", arm, "--seconds", settings.seconds]
    started = time.perf_counter()
    with open(folder / "steps.jsonl", "w+", encoding="utf-8") as output, open(folder / "log", "w+") as log:
        process = subprocess.Popen([sys.executable, *map(str, command)], stdout=output, stderr=log, cwd=REPO)
        file, first = folder / ("metrics.jsonl" if arm in OURS else "steps.jsonl"), None
        ended = 0
        while not ended:
            time.sleep(0.02)
            if first is None and file.exists() and file.stat().st_size:
                first = time.perf_counter() - started
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if status or first is None:
            log.seek(0)
            raise UserError(f"{arm} failed: {(log.read().strip().splitlines() or ['no message'])[-1]}")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    ends = [row["seconds"] for row in rows if "train_loss" in row]
    gpu = max((row.get("gpu_bytes", 0) for row in rows), default=0)
    if len(ends) < 4:
        raise UserError(f"{arm} did only {len(ends)} steps in {settings.seconds:g} s: increase --seconds")
    step = statistics.median(np.diff(ends[1:]))
    return {
        "speed": settings.windows * block_size / step,
        "first": first,
        "memory": (gpu or usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)) / 1e9,
    }


def run_peer(
    name: str, settings: SimpleNamespace, config: GPTConfig, device: torch.device, tokens: np.ndarray
) -> None:
    """The plain loop that most people would write; prints one JSON line per step."""
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

    shape = {"vocab_size": config.vocab_size, "use_cache": False, "tie_word_embeddings": config.tie_weights}
    if name.startswith("GPT2"):
        shape |= {"n_embd": config.n_embd, "n_layer": config.n_layer, "n_head": config.n_head}
        none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        model = GPT2LMHeadModel(GPT2Config(n_positions=config.block_size, **shape, **none))
    else:
        shape |= {"hidden_size": config.n_embd, "num_hidden_layers": config.n_layer}
        shape |= {"num_attention_heads": config.n_head, "num_key_value_heads": config.n_head}
        shape |= {"head_dim": config.head_dim, "intermediate_size": config.n_hidden}
        model = Qwen3ForCausalLM(Qwen3Config(max_position_embeddings=config.block_size, **shape))
    model.to(device).train()
    forward = torch.compile(model) if name.endswith("compiled") else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator, seconds, step, micro_batch = np.random.default_rng(0), 0.0, 0, settings.micro_batch
    while seconds < settings.seconds:
        started = time.perf_counter()
        starts = generator.integers(len(tokens) - config.block_size, size=settings.windows)
        try:
            for first in range(0, settings.windows, micro_batch):
                chosen = starts[first : first + micro_batch, None] + np.arange(config.block_size + 1)
                ids = torch.from_numpy(tokens[chosen].astype(np.int64)).to(device, non_blocking=True)
                with torch.autocast(device.type, torch.bfloat16, enabled="bfloat16" in name):
                    logits = forward(input_ids=ids[:, :-1]).logits
                    loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
                (loss * len(chosen) / settings.windows).backward()
        except torch.OutOfMemoryError:  # a small GPU
            if micro_batch == 1:
                raise
            micro_batch //= 2
            logits = loss = None  # which keep the failed pass in memory
            optimizer.zero_grad(set_to_none=True)
            continue
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        step += 1
        if step > 1:  # the first step compiles
            seconds += time.perf_counter() - started
        row = {"step": step, "seconds": seconds, "train_loss": loss.item()}
        if device.type == "cuda":
            row["gpu_bytes"] = torch.cuda.max_memory_allocated()
        print(json.dumps(row), flush=True)


def print_table(results: dict[str, list[dict]], flops_per_token: float, device: torch.device) -> None:
    """Print medians over the rounds; the first step is of the last round, when the compile caches are full."""
    peak = peak_flops(device)
    unit = "MFU" if peak else "GFLOP/s"
    speeds = {arm: statistics.median(turn["speed"] for turn in turns) for arm, turns in results.items()}
    best = max((speed for arm, speed in speeds.items() if arm not in OURS), default=None)
    print(
        f"\n| arm | tokens/s | lowest to highest | first step, s | peak memory, GB | {unit} | of the best peer |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for arm, turns in sorted(results.items(), key=lambda entry: -speeds[entry[0]]):
        spread = f"{min(t['speed'] for t in turns):,.0f} to {max(t['speed'] for t in turns):,.0f}"
        rate = flops_per_token * speeds[arm]
        work = f"{100 * rate / peak:.1f} %" if peak else f"{rate / 1e9:.0f}"
        memory = max(t["memory"] for t in turns)
        ratio = f"{speeds[arm] / best:.2f}" if best else ""
        print(
            f"| {arm} | {speeds[arm]:,.0f} | {spread} | {turns[-1]['first']:.1f} | {memory:.2f} | {work} | {ratio} |"
        )


if __name__ == "__main__":
    run_script(main)
