"""The kernels in C against the model in float64, and against decoding without them."""

import copy
import platform
import shutil
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch
from test_decoder import CPU, FAMILIES, make_model, needs_kernels, token_ids

from model import kernels
from model.decoder import Decoder, KVCache, choose_weights
from model.errors import UserError

pytestmark = needs_kernels
SHAPES = [{}, {"tie_weights": False}, {"n_embd": 60, "n_head": 2}, {"n_embd": 30, "n_head": 3}, {"n_embd": 8}]


@pytest.mark.parametrize("chunks", [[32], [1] * 32, [5, 1, 7, 19], [31, 1]])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("blocks", FAMILIES)
@torch.no_grad()
def test_the_kernels_give_the_logits_of_float64(blocks, shape, chunks):
    """Within 1e-5 of the logits' norm in float32, and within 10 % in int8, also for odd shapes."""
    model, ids = make_model(blocks, **shape), token_ids()
    exact = copy.deepcopy(model).double()(ids)
    for weights, tolerance in (("float32", 1e-5), ("int8", 0.1)):
        decoder = Decoder(model, weights)
        assert decoder.network is not None
        cache = KVCache(decoder, len(ids), 32)
        for chunk in chunks:
            logits = decoder(ids[:, cache.length : cache.length + chunk], cache)
            expected = exact[:, cache.length - 1]
            assert 0 < (logits - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("size", [32, 48, 64, 128, 20, 144])
@pytest.mark.parametrize("blocks", FAMILIES)
@torch.no_grad()
def test_keys_and_values_may_have_16_bits(blocks, size):
    """For the head sizes with code of their own, and for others: logits within 2 % of float64."""
    model, ids = make_model(blocks, n_embd=2 * size, n_head=2), token_ids()
    exact = copy.deepcopy(model).double()(ids)[:, -1]
    errors, caches = [], []
    for dtype in (torch.float32, torch.bfloat16):
        decoder = Decoder(model)
        assert decoder.cache_dtype == torch.float32 and Decoder(model, "int8").cache_dtype == torch.bfloat16
        decoder.cache_dtype = dtype
        caches.append(KVCache(decoder, len(ids), 32))
        logits = decoder(ids, caches[-1])
        errors.append(((logits - exact).norm() / exact.norm()).item())
    assert errors[0] < 1e-5 < errors[1] < 0.02
    wide, narrow = caches
    assert torch.equal(wide.k[0].bfloat16(), narrow.k[0]) and torch.equal(wide.v[0].bfloat16(), narrow.v[0])


@torch.no_grad()
def test_the_kernels_know_grouped_keys():
    model, ids = make_model("modern", n_kv_head=2, head_size=24), token_ids()
    decoder = Decoder(model)
    logits, exact = decoder(ids, KVCache(decoder, len(ids), 32)), copy.deepcopy(model).double()(ids)[:, -1]
    torch.testing.assert_close(logits.double(), exact, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("blocks", FAMILIES)
@torch.no_grad()
def test_a_sequence_has_the_same_bits_in_any_company(blocks, weights, monkeypatch):
    """Whatever the number of sequences, of threads, and of tokens at a time."""
    decoder, ids, counts = (
        Decoder(make_model(blocks, n_embd=96), weights),
        token_ids(rows=40),
        cycle((1, 2, 3)),
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: next(counts))
    monkeypatch.setattr(kernels.Network, "choose_threads", lambda self: next(counts))
    caches = {rows: KVCache(decoder, rows, 32) for rows in (1, 2, 5, 7, 13, 25, 40)}
    for position in range(32):
        now = ids[:, position : position + 1]
        logits = {rows: decoder(now[-rows:], cache) for rows, cache in caches.items()}
        assert all(torch.equal(some, logits[40][-rows:]) for rows, some in logits.items())
    assert torch.equal(decoder(ids, KVCache(decoder, 40, 32)), logits[40])


def library_of(**functions):
    """load() of a library that has these functions."""
    return lambda: kernels.Kernels(SimpleNamespace(decode_memory=lambda *_: 1, **functions), "")


@pytest.mark.parametrize(
    ("seconds", "ones", "faster"),
    [({1: 1.5, 3: 1.0}, 8, 3), ({1: 1.0, 3: 2.0}, 8, 1), ({1: 20.0, 3: 1.0}, 1, 3)],
)
def test_the_faster_number_of_threads_is_taken(monkeypatch, seconds, ones, faster):
    decoder, used, now = Decoder(make_model("modern")), [], [0.0]

    def decode(*arguments):
        used.append(arguments[-1])
        now[0] += seconds[used[-1]] * (1 + len(used) % 3 / 10)  # the fastest step counts

    monkeypatch.setattr(
        kernels,
        "load",
        library_of(decode=decode),
    )
    monkeypatch.setattr(kernels.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    few, trial, period = decoder.network.FEW, decoder.network.TRIAL, decoder.network.PERIOD
    for rows in [1] * (period + 1) + [few, few + 1]:
        decoder(token_ids(rows=rows, length=1), KVCache(decoder, rows, 32))
    assert used == [3] * trial + [1] * ones + [faster] * (period - trial - ones) + [3] * 3


def test_threads_that_become_slow_are_left_before_the_next_trial(monkeypatch):
    decoder, used, now = Decoder(make_model("modern")), [], [0.0]

    def decode(*arguments):
        used.append(arguments[-1])
        slow = len(used) in (20, 22) or len(used) > 40  # a few steps, and all from one on
        now[0] += 1.5 if used[-1] == 1 else 30.0 if slow else 1.0

    monkeypatch.setattr(
        kernels,
        "load",
        library_of(decode=decode),
    )
    monkeypatch.setattr(kernels.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for _ in range(60):
        decoder(token_ids(rows=1, length=1), KVCache(decoder, 1, 32))
    assert used == [2] * 8 + [1] * 8 + [2] * 29 + [1] * 15


def test_a_number_of_threads_without_a_time_gets_a_single_step(monkeypatch):
    """It may be many times slower than the other."""
    decoder, calls, now = Decoder(make_model("modern")), [], [0.0]

    def write_tokens(*arguments):
        shape, threads, sequences = arguments[6]._obj, arguments[-3], arguments[-2]._obj
        calls.append((threads, sequences.steps))
        shape.start += sequences.steps
        now[0] += sequences.steps * (1e-2 if threads == 1 else 1e-4)
        return sequences.steps

    monkeypatch.setattr(kernels, "load", library_of(write_tokens=write_tokens))
    monkeypatch.setattr(kernels.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    cache, filters = KVCache(decoder, 1, 32), kernels.Filters(1, 1, 1.0, 1.0, 0.0)
    streams = token_ids(rows=1), torch.ones(1, dtype=torch.long), torch.rand(1, 32)
    for _ in range(5):
        done, _ = decoder.network.write(cache, *streams, cache.length + 1, 30 - cache.length, filters)
        cache.extend(done)
    assert calls == [(3, 1), (3, 8), (1, 1), (3, 3), (3, 8)]


def test_a_trial_is_due_after_some_steps_however_many_a_call_takes(monkeypatch):
    network = Decoder(make_model("modern")).network
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    network.seconds, network.steps = {1: 1.0, 2: 2.0}, network.PERIOD - 1
    assert network.choose_threads() == 1
    network.steps += network.STEPS
    assert network.choose_threads() == 2 and not network.seconds


@torch.no_grad()
def test_int8_numbers_are_the_nearest_multiples_of_a_rows_scale():
    """Those of weights and of inputs; and a row of zeros stays one."""
    model, ids = make_model("modern", tie_weights=False), token_ids(rows=12)
    model.head.weight[3] = 0
    decoder = Decoder(model, "int8")
    rounded = copy.deepcopy(model)
    for block in rounded.blocks:
        for norm, matrix in (
            (block.attention_norm, block.attention.qkv),
            (None, block.attention.proj),
            (block.mlp_norm, block.mlp.gate_up),
            (None, block.mlp.down),
        ):
            round_to_int8(norm, matrix)
    round_to_int8(rounded.norm, rounded.head)
    decoder.cache_dtype = torch.float32  # what narrower keys and values cost is tested elsewhere
    logits = decoder(ids, KVCache(decoder, 12, 32))
    near = torch.isclose(logits.double(), rounded.double()(ids)[:, -1], atol=1e-4, rtol=1e-5).all(1)
    assert near.sum() >= 9  # in a few rows an input lies between two multiples, up to float32's rounding
    assert (logits[:, 3] == 0).all()


def round_to_int8(norm, matrix):
    matrix.weight.copy_(rounded_rows(matrix.weight if norm is None else matrix.weight * norm.weight))
    if norm is None:
        matrix.register_forward_pre_hook(lambda _, inputs: rounded_rows(inputs[0]))
    else:
        norm.weight.fill_(1)
        norm.register_forward_hook(lambda *results: rounded_rows(results[-1]))


def rounded_rows(x):
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return (x / scale).round() * scale


OLDER_PROCESSORS = ["-mno-avx512f", "-mno-avx512f -mno-avx2"]


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("gcc"), reason="gcc's options for x86")
@pytest.mark.parametrize("options", OLDER_PROCESSORS)
def test_code_for_older_processors_computes_the_same(monkeypatch, options):
    monkeypatch.setenv("CC", f"gcc {options}")
    older = kernels.load.__wrapped__()
    assert older.library._name != kernels.load().library._name
    monkeypatch.setattr(kernels, "load", lambda: older)
    test_int8_numbers_are_the_nearest_multiples_of_a_rows_scale()
    for blocks in FAMILIES:
        test_the_kernels_give_the_logits_of_float64(blocks, {"n_embd": 30, "n_head": 3}, [5, 1, 7, 19])


@pytest.mark.parametrize("count", [1, 7, 64, 100])
@pytest.mark.parametrize("temperature", [1e-30, 0.7, 1.0, 50.0])
def test_tokens_are_drawn_from_the_likeliest_in_descending_order(count, temperature):
    generator = torch.Generator().manual_seed(0)
    logits, uniforms = 5 * torch.randn(300, 100, generator=generator), torch.rand(300, generator=generator)
    exact = ((logits.double() - logits.amax(1, keepdim=True)) / temperature).softmax(-1)
    likeliest, ids = exact.topk(count)
    cumulative = likeliest.cumsum(1)
    drawn = torch.searchsorted(cumulative, uniforms.double()[:, None] * cumulative[:, -1:], right=True)
    found = kernels.sample(logits, kernels.Filters(count, count, temperature, 1.0, 0.0), uniforms)
    assert torch.equal(found, ids.gather(1, drawn)[:, 0])


def test_equal_and_missing_logits_are_drawn_too():
    uniforms, filters = torch.arange(0.1, 1.0, 0.2), kernels.Filters(5, 5, 1.0, 1.0, 0.0)
    assert kernels.sample(torch.zeros(5, 40), filters, uniforms).tolist() == [0, 1, 2, 3, 4]
    ids = kernels.sample(torch.full((5, 40), torch.nan), filters, uniforms)
    assert (ids >= 0).all() and (ids < 40).all()


def test_weights_have_8_bits_unless_asked_for_more():
    assert choose_weights(CPU, "auto") == "int8" and choose_weights(CPU, "float32") == "float32"


def test_what_does_not_fit_the_cache_or_the_context_is_refused():
    decoder = Decoder(make_model("modern"))
    for rows, room, length in ((2, 32, 1), (1, 64, 33)):
        with pytest.raises(ValueError, match=f"{rows} sequences of {length} tokens do not fit"):
            decoder(token_ids(rows, length), KVCache(decoder, 1, room))
    with pytest.raises(ValueError, match="10 tokens do not fit"):
        decoder.network(decoder.embedding[None, :10].clone(), KVCache(decoder, 1, 9))
    with pytest.raises(ValueError, match="int8 weights need the kernels in C"):
        Decoder(make_model("modern").double(), "int8")


def test_too_large_a_piece_of_memory_is_a_memory_error():
    with pytest.raises(MemoryError, match=f"allocate {1 << 60} bytes"):
        kernels.huge_pages(1 << 60)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """load() as in a new process, with an empty cache."""
    monkeypatch.setattr(kernels, "CACHE", tmp_path / "kernels")
    return kernels.load.__wrapped__


def test_kernels_are_compiled_once(fresh):
    assert fresh()[0] is not None
    made = {path: path.stat().st_mtime_ns for path in kernels.CACHE.iterdir()}
    assert fresh()[0] is not None
    assert {path: path.stat().st_mtime_ns for path in kernels.CACHE.iterdir()} == made


def test_without_openmp_one_thread_does_it(fresh, monkeypatch):
    monkeypatch.setattr(kernels, "OPENMP", ("-fno-such-flag", "-fopenmp-simd"))
    library, reason = fresh()
    assert library is not None and reason.startswith("one thread only with ")


def test_where_the_cache_cannot_be_written_kernels_are_temporary(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(kernels, "CACHE", tmp_path / "file" / "kernels")
    library, _ = fresh()
    assert library is not None and str(tmp_path) not in library._name


def test_the_compiler_may_have_arguments(fresh, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -O1")
    first = fresh()[0]
    monkeypatch.setenv("CC", next(filter(shutil.which, ("gcc", "clang", "cc"))) + " -O1")
    assert first is not None and fresh()[0]._name != first._name


@pytest.mark.parametrize(
    ("compiler", "says"),
    [
        ("", "no C compiler here"),
        ("#!/bin/sh\necho no room >&2; exit 1", "gcc: no room"),
        ("#!/bin/sh\nexit 3", "gcc: exit status 3"),
    ],
)
def test_without_a_compiler_decoding_is_plain(fresh, monkeypatch, tmp_path, compiler, says):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    if compiler:
        (tmp_path / "gcc").write_text(compiler)
        (tmp_path / "gcc").chmod(0o755)
    library, reason = fresh()
    assert library is None and reason.endswith(says) and not list(tmp_path.glob("kernels/*"))
    monkeypatch.setattr(kernels, "load", lambda: kernels.Kernels(None, reason))
    assert choose_weights(CPU, "auto") == "float32" and Decoder(make_model("modern")).network is None
    with pytest.raises(UserError, match="int8 weights need compiled kernels") as error:
        choose_weights(CPU, "int8")
    assert reason in str(error.value)


def test_other_code_another_compiler_or_processor_has_a_library_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "CACHE", tmp_path)
    monkeypatch.setattr(kernels, "build", lambda command, path: None)
    paths = [kernels.compiled(["cc"]), kernels.compiled(["cc", "-O1"])]
    monkeypatch.setattr(kernels, "processor", lambda: ["another"])
    paths.append(kernels.compiled(["cc"]))
    monkeypatch.setattr(kernels, "SOURCE", tmp_path / "other.c")
    for name in ("other.c", "other.h"):
        (tmp_path / name).write_text("int x;")
        paths.append(kernels.compiled(["cc"]))
    assert len(set(paths)) == 5
