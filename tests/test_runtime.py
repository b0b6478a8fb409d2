"""Device, precision and compiler, as they are chosen on other machines than this one."""

import importlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training import CPU

from model.errors import first_line
from model.runtime import (
    COMPILED,
    choose_compile,
    choose_device,
    choose_dtype,
    choose_runtime,
    keep_headers,
    peak_flops,
)


def test_a_gpu_that_this_pytorch_cannot_use_is_mentioned_unless_it_is_hidden(monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(Path, "exists", lambda self: True)  # /proc/driver/nvidia/version
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device("auto") == CPU and not capsys.readouterr().err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert choose_device("auto") == CPU and "using the CPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "able", "dtype"),
    [
        ("cuda", (8, 0), torch.bfloat16),
        ("cuda", (7, 5), torch.float16),
        ("cpu", {"amx_bf16": True}, torch.bfloat16),
        ("cpu", {"avx512_bf16": True}, torch.bfloat16),
        ("cpu", {"avx512_bf16": False, "avx2": True}, torch.float32),
        ("mps", None, torch.float32),
    ],
)
def test_the_precision_suits_the_device(monkeypatch, device, able, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: able)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert choose_dtype(torch.device(device), "auto")[0] == dtype
    assert ("slow" in choose_dtype(torch.device(device), "float16")[1]) == (device == "cpu")


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """programs(name, ...): only these are installed, and Python's headers."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("model.runtime.sysconfig", SimpleNamespace(get_path=lambda name: str(tmp_path)))
    monkeypatch.setattr("model.runtime.COMPILED", tmp_path / "inductor")
    for name in ("CXX", "CC", "TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"):
        monkeypatch.setenv(name, "")  # so that they are as before in the end
        monkeypatch.delenv(name)

    def programs(*names):
        (tmp_path / "bin").mkdir()
        for name in names:
            (tmp_path / "bin" / name).write_text("#!/bin/sh")
            (tmp_path / "bin" / name).chmod(0o755)

    return programs


@pytest.mark.parametrize(
    ("installed", "named", "taken"),
    [
        (["g++", "clang++"], None, "g++"),
        (["clang++", "c++"], None, "clang++"),
        (["mine", "g++"], "mine", "mine"),
        (["c++"], "missing", "c++"),
        (["gcc"], None, None),
    ],
)
def test_the_compiler_is_one_that_is_installed(programs, monkeypatch, installed, named, taken):
    programs(*installed)
    if named:
        monkeypatch.setenv("CXX", named)
    monkeypatch.setenv("CC", "gcc")  # for C++, it does not count
    compiles, reason = choose_compile(CPU, "auto")
    assert compiles == (taken is not None) and (taken or reason == "no C++ compiler here")
    choose_runtime(CPU, "float32", "auto")
    assert os.environ.get("CXX") == taken
    assert os.environ["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] == "0"  # they take openssl


def test_where_compiled_code_cannot_be_kept_or_has_a_space_in_its_path(programs, monkeypatch, tmp_path):
    programs("g++")
    monkeypatch.setattr("model.runtime.COMPILED", tmp_path / "a b" / "inductor")
    compiles, reason = choose_compile(CPU, "auto")
    assert not compiles and "has a space in its name" in reason
    monkeypatch.setattr("model.runtime.COMPILED", tmp_path / "inductor")
    assert choose_compile(CPU, "auto")[0]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    choose_runtime(CPU, "float32", "auto")
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_headers_are_kept_with_the_compiled_code_that_is_discarded_if_it_was_cut_short(monkeypatch):
    codecache = importlib.import_module("torch._inductor.codecache")
    for name in ("_HEADER_DIR", "_HEADER_LOCK_DIR"):  # fails if PyTorch calls them otherwise one day
        monkeypatch.setattr(codecache, name, "elsewhere")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "a user's own")
    keep_headers()
    assert codecache._HEADER_DIR == "elsewhere"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(COMPILED))
    keep_headers()
    assert COMPILED in Path(codecache._HEADER_DIR).parents
    assert Path(codecache._HEADER_DIR) in Path(codecache._HEADER_LOCK_DIR).parents


def test_the_reason_that_a_compiler_gives_is_shown():
    error = RuntimeError("C++ compile error\n\nCommand:\ng++ a.cpp\n\nOutput:\na.cpp:1: error: no room\nmore")
    assert first_line(error) == "a.cpp:1: error: no room"


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA L40", None),
    ],
)
def test_only_a_gpu_of_that_name_has_that_peak(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
