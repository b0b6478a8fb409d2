"""Generation speed, for one story and for a batch, next to transformers' generate and llama2.c's two programs.

python benchmarks/generate_speed.py                                  random weights with stories-15m's shape
python benchmarks/generate_speed.py --llama2c PATH                   a folder with compiled run and runq, tokenizer.bin
python benchmarks/generate_speed.py --checkpoint checkpoints/best.pt  time to first word, and cost of low precision

All take turns in every round; the medians of tokens per second are printed. All sample with temperature 0.8 and
top-p 0.95. The weights are random, except for a final norm large enough that a few tokens have most of the
probability, as after training. The cost of low precision is measured in bits per byte, on validation stories
truncated to the context and fed token by token, as in generation. Needs requirements-test.txt.
"""

import math
import os
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.script import run_script  # before torch: see there

# isort: split
import numpy as np
import torch
from tqdm import tqdm

from model.checkpoint import find_checkpoint, load_model
from model.config import PRESETS, GPTConfig
from model.decoder import Decoder, KVCache, choose_weights
from model.errors import UserError
from model.generation import generate_all
from model.gpt import GPT
from model.loss import bits_per_byte
from model.packed_data import load_data, real_stories
from model.runtime import choose_device, device_name
from model.sampling import Sampling
from model.settings import REPO, read_settings

PRESET: str = "stories-15m"  # model shape
STREAMS: int = 64  # batch size, measured as well as a single story
TOKENS: int = 240  # tokens per story
ROUNDS: int = 5  # rounds, of which the median counts
DEVICE: str = "auto"  # auto, cpu, cuda or mps
LLAMA2C: str | None = None  # folder with llama2.c's run and runq, compiled, and its tokenizer.bin
CHECKPOINT: str | None = None  # a trained model, for time to first word and cost of low precision
CHECKPOINT_DIR: str = "checkpoints"  # where to look for best, latest and steps
DATA_DIR: str = "data"  # folder with tokenizer/ and processed/, for measuring the cost
MAX_SAMPLES: int = 256  # validation stories for measuring the cost

# The presets whose shape the others know, too
MODERN = tuple(name for name, preset in PRESETS.items() if preset.config.blocks == "modern")
SAMPLING = Sampling()
FINAL_NORM = 18.0


def main() -> None:
    settings = read_settings(__file__, choices={"preset": MODERN})
    device, config = choose_device(settings.device), PRESETS[settings.preset].config
    if settings.checkpoint is not None:
        path = find_checkpoint(settings.checkpoint_dir, settings.checkpoint, prefer="best")
        data = load_data(settings.data_dir)
    print(f"{settings.preset}: {device_name(device)}; torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        contenders = list_contenders(settings, config, device, Path(folder))
        speeds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in tqdm(range(settings.rounds), unit="round", disable=None, leave=False):
            for name, contender in contenders.items():
                speeds[name].append(contender())
    for name, values in speeds.items():
        print(
            f"{name:<44} {statistics.median(values):>9,.0f} tokens/s  ({min(values):,.0f} to {max(values):,.0f})"
        )
    if settings.checkpoint is not None:
        waits = [first_word(path) for _ in range(settings.rounds)]
        print(f"{'from the command to the first word':<44} {statistics.median(waits):>9.2f} s")
        print_cost(path, device, real_stories([data.validation], data, settings.max_samples))


def list_contenders(
    settings, config: GPTConfig, device: torch.device, folder: Path
) -> dict[str, Callable[[], float]]:
    torch.manual_seed(0)
    model = GPT(config).eval().to(device)
    torch.nn.init.constant_(model.norm.weight, FINAL_NORM)
    contenders: dict[str, Callable[[], float]] = {}
    for weights in precisions(device):
        decoder = Decoder(model, weights, graphs=True)
        for streams in (1, settings.streams):
            write = partial(
                generate_all, decoder, [[0]] * streams, settings.tokens, -1, SAMPLING, list(range(streams))
            )
            contenders[f"{weights}, {streams} at once"] = partial(
                rate, write, streams * settings.tokens, device
            )
    contenders |= transformers_contenders(config, device, settings.tokens)
    if settings.llama2c is not None:
        place = Path(settings.llama2c).resolve()
        options = ["-z", place / "tokenizer.bin", "-n", config.block_size, "-p", SAMPLING.top_p]
        programs = {"llama2.c run, float32": "run", "llama2.c runq, int8": "runq"}
        for (name, program), weights in zip(programs.items(), write_llama2c(folder, config), strict=True):
            command = [place / program, weights, *options]
            contenders[f"{name}, greedy"] = partial(run_c, [*command, "-t", 0])
            contenders[name] = partial(run_c, [*command, "-t", SAMPLING.temperature])
    return contenders


def precisions(device: torch.device) -> list[str]:
    """The weights that can be had, the exact ones first."""
    fewer_bits = choose_weights(device, "auto") if device.type == "cpu" else "float16"
    return list(dict.fromkeys(("float32", fewer_bits)))


def rate(write: Callable, tokens: int, device: torch.device) -> float:
    started = time.perf_counter()
    write()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return tokens / (time.perf_counter() - started)


def transformers_contenders(
    config: GPTConfig, device: torch.device, tokens: int
) -> dict[str, Callable[[], float]]:
    """transformers' generate for a model of the same shape, with a dynamic and a static cache."""
    try:
        from transformers import Qwen3Config, Qwen3ForCausalLM
    except ImportError:
        raise UserError("this also measures transformers: pip install -r requirements-test.txt") from None

    shape = Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=config.n_hidden,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_head,
        head_dim=config.head_dim,
        max_position_embeddings=config.block_size,
        tie_word_embeddings=config.tie_weights,
    )
    contenders = {}
    for dtype in (torch.float32, torch.bfloat16):
        network = Qwen3ForCausalLM(shape).eval()
        torch.nn.init.constant_(network.model.norm.weight, FINAL_NORM)
        network = network.to(device, dtype)
        start = torch.zeros(1, 1, dtype=torch.long, device=device)
        for cache in ("dynamic", "static"):
            write = partial(
                network.generate,
                start,
                attention_mask=torch.ones_like(start),
                cache_implementation=cache,
                do_sample=True,
                temperature=SAMPLING.temperature,
                top_p=SAMPLING.top_p,
                top_k=0,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                pad_token_id=0,
                disable_compile=device.type == "cpu",  # where it takes minutes
            )
            name = f"transformers, {str(dtype).removeprefix('torch.')}, {cache} cache"
            contenders[name] = partial(rate, write, tokens, device)
    return contenders


def write_llama2c(folder: Path, config: GPTConfig) -> tuple[Path, Path]:
    """Write random weights of the same shape in llama2.c's two formats: for `run`, seven sizes and float32 numbers; for
    `runq`, a header of 256 bytes, the norms in float32, and each matrix as int8 with a float32 scale for each group."""
    C, hidden, layers, V = config.n_embd, config.n_hidden, config.n_layer, config.vocab_size
    generator = np.random.default_rng(0)

    def numbers(*shape: int) -> np.ndarray:
        return (0.02 * generator.standard_normal(shape)).astype(np.float32)

    sizes = struct.pack("7i", C, hidden, layers, config.n_head, config.n_head, V, config.block_size)
    ones, last_norm = np.ones((layers, C), np.float32), np.full(C, FINAL_NORM, np.float32)
    embedding = numbers(V, C)
    attention, feed_forward = numbers(4 * layers, C, C), numbers(3 * layers, C, hidden)
    rotary = numbers(config.block_size, config.head_dim)  # skipped by run.c
    arrays = (embedding, ones, attention, ones, feed_forward, last_norm, rotary)
    whole = folder / "model.bin"
    whole.write_bytes(sizes + b"".join(array.tobytes() for array in arrays))

    group = math.gcd(64, C, hidden)  # 64 where it divides both, as in llama2.c
    parts = [struct.pack("<Ii", 0x616B3432, 2) + sizes + struct.pack("<Bi", True, group)]
    parts[0] += bytes(256 - len(parts[0]))
    parts += [array.tobytes() for array in (ones, ones, last_norm)]
    for matrix in (embedding, *attention, *feed_forward):
        groups = matrix.reshape(-1, group)
        scales = np.abs(groups).max(axis=1, keepdims=True) / 127
        parts += [np.rint(groups / scales).astype(np.int8).tobytes(), scales.tobytes()]
    quantised = folder / "model_q80.bin"
    quantised.write_bytes(b"".join(parts))
    return whole, quantised


def run_c(command: list) -> float:
    """The speed that a program reports, as it ships; with another seed if its story ended after a few tokens."""
    env = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    for seed in range(1, 20):
        words = [*map(str, command), "-s", str(seed)]
        said = subprocess.run(words, capture_output=True, timeout=300, env=env).stderr.decode(
            errors="replace"
        )
        speed = float(re.search(r"tok/s: ([\d.]+|inf)", said)[1])
        if 10 < speed < math.inf:
            return speed
    raise RuntimeError(f"{command[0]} gave no speed")


def first_word(checkpoint: Path) -> float:
    """Seconds from starting generate.py to the first visible output."""
    command = [
        sys.executable,
        REPO / "generate.py",
        "--checkpoint",
        checkpoint,
        "--seed",
        "1",
        "--max-tokens",
        "20",
    ]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        while not (letter := process.stdout.read(1)).strip():
            if not letter:
                raise RuntimeError(f"generate.py wrote nothing (exit status {process.wait()})")
        seconds = time.perf_counter() - started
        process.stdout.read()
    return seconds


@torch.inference_mode()
def print_cost(path: Path, device: torch.device, stories: list[str]) -> None:
    model, tokenizer, checkpoint = load_model(path, device)
    eot_id, block_size = checkpoint["eot_id"], model.config.block_size
    sequences = [
        [eot_id, *tokenizer.encode(s, add_special_tokens=False).ids, eot_id][: block_size + 1]
        for s in stories
    ]
    size = sum(len(tokenizer.decode(ids[1:]).encode()) for ids in sequences)
    exact = None
    for weights in precisions(device):
        decoder, nats = Decoder(model, weights), 0.0
        for first in range(0, len(sequences), 64):
            part = sequences[first : first + 64]
            longest = max(map(len, part))
            ids = torch.tensor([s + [-1] * (longest - len(s)) for s in part], device=device)
            cache = KVCache(decoder, len(part), block_size)
            for position in range(longest - 1):
                logits = decoder(ids[:, position : position + 1].clamp(min=0), cache)
                loss = torch.nn.functional.cross_entropy(
                    logits, ids[:, position + 1], reduction="sum", ignore_index=-1
                )
                nats += loss.item()
        bits = bits_per_byte(nats, size)
        exact = exact or bits
        print(
            f"{weights + ', bits per byte':<44} {bits:>11.5f}  ({bits / exact - 1:+.4%}; {len(stories)} stories)"
        )


if __name__ == "__main__":
    run_script(main)
