"""Several processes that train together, and how they stop."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PATIENCE, REPO
from training import (
    LARGE_VOCABULARY,
    TINY,
    losses,
    wait_for_checkpoint,
)

from model.checkpoint import load_checkpoint
from model.processes import Processes, StopRequest, start_processes


def torchrun_command(processes, packed, folder, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [REPO / "train.py", *TINY, "--dtype", "float32", "--micro-batch", 3, *flags]
    return [*map(str, command), "--data-dir", str(packed), "--checkpoint-dir", str(folder)]


def torchrun(*arguments, check=True):
    command, env = torchrun_command(*arguments), {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=env)
    assert not check or result.returncode == 0, result.stderr
    return result


def test_four_processes_train_as_one_does(train, packed, tmp_path):
    flags = ["--dropout", 0.1, "--micro-batch", 4, *LARGE_VOCABULARY]
    one, _ = train("one", "--dtype", "float32", *flags)
    result = torchrun(4, packed, tmp_path / "four", *flags)
    assert result.stdout.count("steps: 12") == 1  # only the first process speaks
    assert "Warning" not in result.stderr, result.stderr
    np.testing.assert_allclose(losses(tmp_path / "four"), losses(one), rtol=1e-5)


def test_a_rank_alone_is_no_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "1")  # as other launchers and users may set it
    assert start_processes("cpu") == Processes()


def test_fewer_windows_than_processes_are_refused(packed, tmp_path):
    result = torchrun(2, packed, tmp_path / "two", "--batch-tokens", 32, check=False)
    assert "error: a step has 1 windows for 2 processes" in result.stderr and "Traceback" not in result.stdout


def test_processes_that_would_share_a_gpu_are_refused(packed, tmp_path):
    result = torchrun(2, packed, tmp_path / "two", "--device", "cuda:1", check=False)
    assert "leave out --device cuda:1" in result.stderr and "Traceback" not in result.stdout


def test_a_run_moves_from_one_process_to_two_and_back(train, packed, tmp_path):
    """Made longer twice; a decay over the last step alone leaves all others alike."""
    whole, _ = train("whole", "--dtype", "float32", "--decay-fraction", "0.01")
    folder, _ = train("moved", "--dtype", "float32", "--decay-fraction", "0.01", "--max-steps", 4)
    torchrun(2, packed, folder, "--decay-fraction", "0.01", "--max-steps", 8)
    train("moved", "--dtype", "float32", "--decay-fraction", "0.01", "--max-steps", 12)
    np.testing.assert_allclose(losses(folder), losses(whole), rtol=1e-5)


def test_three_processes_resume_exactly(packed, tmp_path):
    """With more than two, sums depend on the order in which the processes' gradients are added."""
    flags = ["--n-embd", 64, "--n-layer", 2, "--grow-at", 0.6, "--batch-tokens", 128, "--max-steps", 10]
    flags += ["--save-interval", 3, "--keep", 9, "--eval-interval", 20]
    torchrun(3, packed, tmp_path / "whole", *flags)
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "whole" / "ckpt_3.pt", tmp_path / "resumed")
    torchrun(3, packed, tmp_path / "resumed", *flags)
    whole, resumed = (
        load_checkpoint(tmp_path / name / "ckpt_10.pt")["weights"] for name in ("whole", "resumed")
    )
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


INTERRUPTED = """
import sys

sys.path.insert(0, sys.argv[1])
from model.processes import start_processes, stop_processes
from model.script import run_script


def main():
    start_processes("cpu")
    try:
        raise eval(sys.argv[2])
    finally:
        stop_processes()


run_script(main)
"""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ("KeyboardInterrupt", 130),
        ("BrokenPipeError", 141),
        ("OSError(28, 'No space left', 'a.pt')", 2),
        ("KeyError('defect')", 1),
    ],
)
def test_a_process_of_several_ends_with_the_status_of_its_error(tmp_path, error, status):
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command += [str(tmp_path / "interrupted.py"), str(REPO), error]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert re.search(rf"exitcode +: {status} ", result.stderr), result.stderr


LATE = """
import contextlib
import os
import sys

import torch.distributed as dist

sys.path.insert(0, sys.argv[1])
from model.processes import start_processes, stop_processes

processes = start_processes("cpu")
group = dist.group.WORLD  # held, and its threads with it, as by what training imports
try:
    processes.barrier()
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it may have ended
            with open(f"/proc/self/task/{thread}/comm") as name:
                if "gloo" in name.read():
                    os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
    processes.barrier()
finally:
    stop_processes()
"""


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="only Linux has it")
def test_threads_that_finish_late_abort_no_process(tmp_path):
    """Those of gloo hold the tensors of an operation until after its end, and let go of them when they get a turn."""
    (tmp_path / "late.py").write_text(LATE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=6"]
    command += [str(tmp_path / "late.py"), str(REPO)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr


def test_torchrun_restarts_a_killed_worker_and_the_losses_stay_the_same(train, packed, tmp_path):
    """With --fresh, too: a restart resumes the new run instead of moving it aside."""
    flags = ["--max-steps", 40, "--save-interval", 2, "--fresh"]
    one, _ = train("one", "--dtype", "float32", *flags)
    command = torchrun_command(2, packed, tmp_path / "two", *flags)
    command.insert(command.index("--standalone"), "--max-restarts=1")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=env, **pipes)
    wait_for_checkpoint(tmp_path / "two", process)
    threads = Path(f"/proc/{process.pid}/task").glob("*/children")
    workers = sorted(int(child) for thread in threads for child in thread.read_text().split())
    os.kill(workers[1], signal.SIGKILL)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert "resuming" in output and not list((tmp_path / "two").glob("earlier-*"))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(one), rtol=1e-5)


def test_a_second_ctrl_c_stops_at_once():
    stop = StopRequest(Processes())
    try:
        stop.receive(signal.SIGINT, None)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            stop.receive(signal.SIGINT, None)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize(("ours", "other"), [(signal.SIGTERM, 0), (0, signal.SIGTERM)])
def test_several_processes_stop_together(monkeypatch, ours, other):
    """Not before all have heard of it: the others would wait for gradients of one that is gone."""

    def all_reduce(facts, op):
        facts.copy_(torch.maximum(facts, torch.tensor([other, 0.0], dtype=facts.dtype)))

    monkeypatch.setattr("model.processes.dist.all_reduce", all_reduce)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    stop = StopRequest(Processes(rank=0, world_size=2))
    if ours:
        stop.receive(ours, None)
    assert not stop
    stop.share(1.0)
    assert stop and stop.agreed == signal.SIGTERM


@pytest.mark.parametrize("rank", [0, 1])
def test_training_time_is_the_first_process_own(monkeypatch, rank):
    """Meanwhile, the other has waited for it to evaluate."""
    seconds, other = [(5.0, [0.0, 0.0]), (9.0, [0.0, 5.0])][rank]

    def all_reduce(facts, op):
        facts.copy_(torch.maximum(facts, torch.tensor(other, dtype=facts.dtype)))

    monkeypatch.setattr("model.processes.dist.all_reduce", all_reduce)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert StopRequest(Processes(rank=rank, world_size=2)).share(seconds) == 5.0
