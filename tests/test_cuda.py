"""What only a GPU can show: run where one is, skipped elsewhere. The CPU's results are the reference."""

import itertools
import json
import signal
import sys

import pytest
import torch

import train as train_script
from model.checkpoint import load_checkpoint
from model.config import GPTConfig
from model.decoder import Decoder
from model.generation import Batch, generate_all
from model.gpt import GPT
from model.runtime import choose_device
from model.sampling import Sampling

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
DEVICE = "cuda"

TINY = """--preset quickstart --n-layer 2 --n-head 2 --n-embd 64 --block-size 64 --batch-tokens 1024 --warmup-steps 2
--eval-interval 4 --eval-tokens 1024 --log-interval 1 --sample-tokens 8 --max-minutes none
--grow-at 0.5 --vocab-size 2000 --sampled-softmax""".split()


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """Those that the scripts choose."""
    choose_device(DEVICE)


@pytest.fixture
def train(run, packed, tmp_path):
    """train("name", flags...) trains in tmp_path/name and returns that folder."""

    def train(name, *flags):
        places = ["--data-dir", packed, "--checkpoint-dir", tmp_path / name]
        run("train.py", *TINY, *places, *flags, check=0)
        return tmp_path / name

    return train


def losses(folder, key="train_loss"):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


@pytest.mark.parametrize(
    ("blocks", "dtype", "compiled", "tolerance"),
    [
        ("modern", "float32", "off", 2e-3),
        ("modern", "bfloat16", "on", 2e-2),
        ("modern", "float16", "on", 1e-2),
        ("gpt2", "bfloat16", "off", 2e-2),
    ],
)
def test_a_gpu_learns_as_the_cpu_does(train, blocks, dtype, compiled, tolerance):
    shape = ["--blocks", blocks, "--max-steps", 12]
    exact = train("cpu", *shape, "--device", "cpu", "--dtype", "float32", "--compile", "off")
    found = train("gpu", *shape, "--device", DEVICE, "--dtype", dtype, "--compile", compiled)
    for key in ("train_loss", "validation_loss"):
        assert losses(found, key) == pytest.approx(losses(exact, key), rel=tolerance)


def test_flex_attention_learns_as_plain_attention_does(run, packed, tmp_path):
    shape = ["--block-size", 256, "--batch-tokens", 4096, "--max-steps", 12, "--data-dir", packed]
    printed = {}
    for device in ("cpu", DEVICE):
        # deterministic, so that its speed does not decide
        flags = [*TINY, *shape, "--checkpoint-dir", tmp_path / device, "--device", device, "--deterministic"]
        printed[device] = run("train.py", *flags, check=0).stdout
    if torch.cuda.get_device_capability() >= (8, 0) and "torch.compile on" in printed[DEVICE]:
        assert "FlexAttention within stories" in printed[DEVICE]
    assert losses(tmp_path / DEVICE) == pytest.approx(losses(tmp_path / "cpu"), rel=2e-2)


@pytest.mark.parametrize(
    ("dtype", "compiled", "dropout"),
    [("float32", "off", 0.1), ("bfloat16", "on", 0.1), ("float16", "on", 0)],
)
def test_a_deterministic_run_resumes_exactly(train, dtype, compiled, dropout):
    flags = [
        "--device",
        DEVICE,
        "--dtype",
        dtype,
        "--compile",
        compiled,
        "--dropout",
        dropout,
        "--deterministic",
    ]
    whole = train("whole", *flags, "--max-steps", 12, "--save-interval", 6)
    broken = train("broken", *flags, "--max-steps", 12, "--save-interval", 6)
    (broken / "ckpt_12.pt").unlink()  # so that it resumes from step 6
    (broken / "before_decay.pt").unlink()
    train("broken", "--device", DEVICE)
    assert losses(broken) == losses(whole)
    one, other = (load_checkpoint(folder / "ckpt_12.pt")["weights"] for folder in (whole, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "heads", [{"n_head": 4}, {"n_head": 4, "n_kv_head": 2}, {"n_head": 1, "head_size": 48}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_with_a_story_mask(heads, dtype):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=97, block_size=64, n_layer=2, n_embd=64, **heads))
    ids = torch.randint(97, (3, 65))
    stories = (ids[:, :-1] < 5).cumsum(1)
    results = []
    for device, precision in (("cpu", torch.float32), (DEVICE, dtype)):
        model = model.to(device).train()
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, precision, enabled=precision != torch.float32):
            loss = model(ids[:, :-1].to(device), ids[:, 1:].to(device), stories.to(device))
        loss.backward()
        results.append((loss.item(), [parameter.grad.cpu() for parameter in model.parameters()]))
    (exact, wanted), (found, gradients) = results
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    assert found == pytest.approx(exact, rel=tolerance)
    for one, other in zip(wanted, gradients, strict=True):
        assert (one - other).norm() <= 3 * tolerance * one.norm()


def advance_by_one(batch, most):
    """Batch.advance() with a step as a graph has it, but without the graph."""
    batch.step(graph=True)
    return 1


FLAT = Sampling(temperature=1.5, top_p=0.99)
SAMPLINGS = [
    Sampling(temperature=0),
    Sampling(temperature=0, repetition_penalty=1.6),
    Sampling(temperature=0.8, top_k=12, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
    FLAT,
]


@pytest.mark.parametrize("weights", ["float32", "float16"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "penalised", "filtered", "too few at first"])
@pytest.mark.parametrize("blocks", ["modern", "gpt2"])
def test_a_graph_writes_what_plain_steps_write(blocks, sampling, weights, monkeypatch):
    """And greedily, in float32, what a CPU writes."""
    if sampling == FLAT:
        monkeypatch.setattr("model.generation.LIKELIEST_ON_GPU", 4)  # so that steps are repeated
    torch.manual_seed(0)  # the two likeliest tokens then differ by 6e-4 at least, in float32
    model = GPT(GPTConfig(vocab_size=97, block_size=32, n_layer=2, n_head=2, n_embd=64, blocks=blocks)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    prompts = [[0], [0, 5, 9], [0, *range(1, 20)], [0, *range(1, 60)]]
    arguments = (prompts, 50, 0, sampling, list(range(4)))
    reference = generate_all(Decoder(model), *arguments)
    model = model.to(DEVICE)
    with monkeypatch.context() as patch:
        # Without a mask over the whole cache, or with fewer sequences, a step rounds differently in float16
        half = weights == "float16"
        if half:
            patch.setattr(Batch, "advance", advance_by_one)
        plain = generate_all(Decoder(model, weights, graphs=half), *arguments)
    captures = []
    capture = Batch.capture
    monkeypatch.setattr(Batch, "capture", lambda self, *state: captures.append(capture(self, *state)))
    decoder = Decoder(model, weights, graphs=True)
    assert generate_all(decoder, *arguments) == plain
    assert captures and decoder.graphs  # a failed capture turns graphs off
    if sampling.temperature == 0 and weights == "float32":
        assert plain == reference


def test_scores_are_those_of_the_cpu(run, packed, tmp_path, train):
    folder = train("model", "--device", DEVICE, "--max-steps", 4)
    bits = []
    for device in ("cpu", DEVICE):
        flags = ["--data-dir", packed, "--checkpoint-dir", folder, "--device", device, "--max-samples", 20]
        run("evaluate.py", *flags, "--output", tmp_path / "scores.json", check=0)
        bits.append(json.loads((tmp_path / "scores.json").read_text())["results"][0]["bits_per_byte"])
    assert bits[1] == pytest.approx(bits[0], rel=1e-5)


@pytest.mark.parametrize("block_size", [64, 256])
def test_no_step_between_two_logged_ones_waits_for_the_gpu(packed, tmp_path, monkeypatch, block_size):
    """PyTorch raises an error at whatever synchronises."""

    steps = itertools.count()

    def share(_, seconds):  # before the first step, and at the end of each
        torch.cuda.set_sync_debug_mode("error" if 2 <= next(steps) < 8 else "default")
        return seconds

    places = ["--data-dir", packed, "--checkpoint-dir", tmp_path / "run"]
    flags = [
        *TINY,
        "--device",
        DEVICE,
        "--block-size",
        block_size,
        "--max-steps",
        20,
        "--grow-at",  # after the steps in question, as what comes before the decay is saved after step 8
        0.95,
        "--log-interval",
        100,
        "--eval-interval",
        100,
        *places,
    ]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    monkeypatch.setattr(train_script.StopRequest, "share", share)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        train_script.main()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert len(losses(tmp_path / "run")) == 1
