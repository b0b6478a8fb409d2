"""Generation against a loop without a cache."""

import pytest
import torch
from test_decoder import needs_kernels
from test_sampling import assert_drawn_from, distribution
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import generate as script
from model import generation
from model.config import GPTConfig
from model.decoder import Decoder
from model.errors import UserError
from model.generation import Batch, context_start, generate, generate_all
from model.gpt import GPT
from model.sampling import Sampling, draw, next_distribution
from model.tokenizer import text_tokenizer

torch.set_num_threads(1)

FAMILIES = ("modern", "gpt2")
GREEDY = Sampling(temperature=0)
EOT = 0
# None leads to two next tokens that are equally likely within float32 (whose last bits depend on the CPU)
PROMPTS = [[EOT], [EOT, 5, 6], [EOT, 7, 8, 9, 10, 11, 13], [EOT, 3], [EOT, *range(1, 16)]]
LONG = [[EOT, *range(1, 16), 4], [EOT, *(k % 29 for k in range(1, 45))]]  # beyond the context of 16


def make_model(blocks, noise=0.3, **changes):
    torch.manual_seed(0)
    shape = {"vocab_size": 29, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16, "blocks": blocks}
    model = GPT(GPTConfig(**{**shape, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model


@torch.no_grad()
def continue_without_cache(model, prompt, max_tokens, sampling, seed):
    """One sequence, one forward pass over the whole window for each token."""
    ids, block_size = list(prompt), model.config.block_size
    uniforms = torch.rand(max_tokens, generator=torch.Generator().manual_seed(seed))
    begin = 0
    for turn in range(max_tokens):
        while len(ids) - begin > block_size:  # full: only the last half of the context stays
            begin += block_size + 1 - max(1, block_size // 2)
        logits = model(torch.tensor([ids[begin:]]))[:, -1]
        occurred = torch.zeros_like(logits, dtype=torch.bool)
        occurred[0, [token for token in ids if token != EOT]] = True
        probabilities, order = next_distribution(logits, occurred, sampling)
        token = draw(probabilities, uniforms[turn : turn + 1]).item()
        token = token if order is None else order[0, token].item()
        if token == EOT:
            break
        ids.append(token)
    return ids[len(prompt) :]


WAYS = [
    GREEDY,
    Sampling(temperature=0, repetition_penalty=1.6),
    Sampling(temperature=1.0, top_p=1.0),
    Sampling(temperature=0.8, top_k=12, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
]


@pytest.mark.parametrize("sampling", WAYS, ids=["greedy", "penalised", "sampled", "filtered"])
@pytest.mark.parametrize("blocks", FAMILIES)
def test_the_cache_changes_no_token(blocks, sampling):
    """Also past the context, where the window slides; in float64, and in float32 (with the kernels in C)."""
    model = make_model(blocks)
    exact, fast, lengths = make_model(blocks).double(), Decoder(model), []
    for seed, prompt in enumerate(PROMPTS + LONG):
        expected = continue_without_cache(exact, prompt, 60, sampling, seed)
        assert generate_all(Decoder(exact), [prompt], 60, EOT, sampling, [seed])[0] == expected
        assert generate_all(fast, [prompt], 60, EOT, sampling, [seed])[0] == expected
        lengths.append(len(prompt) + len(expected))
    assert max(lengths) > 4 * model.config.block_size


@pytest.mark.parametrize("sampling", WAYS, ids=["greedy", "penalised", "sampled", "filtered"])
@pytest.mark.parametrize(
    "weights", ["float64", *(pytest.param(name, marks=needs_kernels) for name in ("float32", "int8"))]
)
@pytest.mark.parametrize("blocks", FAMILIES)
def test_a_sequence_is_the_same_in_any_company(blocks, weights, sampling):
    model = make_model(blocks, noise=0.15)
    decoder = Decoder(model.double()) if weights == "float64" else Decoder(model, weights)
    prompts = PROMPTS + LONG
    seeds = list(range(10, 10 + len(prompts)))
    alone = [
        generate_all(decoder, [p], 40, EOT, sampling, [s])[0] for p, s in zip(prompts, seeds, strict=True)
    ]
    assert generate_all(decoder, prompts, 40, EOT, sampling, seeds) == alone
    turned = generate_all(decoder, prompts[::-1], 40, EOT, sampling, seeds[::-1])
    assert turned == alone[::-1]
    if sampling == Sampling(temperature=1.0, top_p=1.0):  # where some end early, and the others go on
        assert len({len(written) for written in alone}) > 3


def test_sequences_that_have_ended_soon_take_no_part_in_a_step(monkeypatch):
    """At most a quarter of the rows are such sequences."""
    rows, advance = [], Batch.advance

    def counting(batch, most):
        rows.append(len(batch.tokens))
        return advance(batch, most)

    monkeypatch.setattr(Batch, "advance", counting)
    decoder, sampling = Decoder(make_model("modern", noise=0.15)), Sampling(temperature=1.0, top_p=1.0)
    written = generate_all(decoder, [[EOT]] * 40, 15, EOT, sampling, list(range(40)))
    going = [sum(len(tokens) > step for tokens in written) for step in range(len(rows))]
    assert all(3 * rows[step] < 4 * going[step] for step in range(len(rows))) and rows[-1] < 30


@needs_kernels
@pytest.mark.parametrize("likeliest", [12, 64])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.3), Sampling(top_k=9, min_p=0.05)])
@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("blocks", FAMILIES)
def test_several_steps_in_a_call_write_what_single_ones_do(blocks, weights, sampling, likeliest, monkeypatch):
    """Where prompts end at different places and sequences drop out, and where the likeliest tokens do not suffice."""
    decoder = Decoder(make_model(blocks, noise=0.2), weights)
    arguments = (decoder, PROMPTS + LONG, 40, EOT, sampling, list(range(7)))
    monkeypatch.setattr(generation, "LIKELIEST", likeliest)
    monkeypatch.setattr(decoder.network, "BURST", 1e9)
    written, write_ahead = [], Batch.write_ahead

    def counting(batch, most):
        written.append(write_ahead(batch, most))
        return written[-1]

    monkeypatch.setattr(Batch, "write_ahead", counting)
    together = generate_all(*arguments)
    assert max(written) == decoder.network.STEPS
    monkeypatch.setattr(Batch, "write_ahead", lambda batch, most: batch.step() or 1)
    assert generate_all(*arguments) == together


def advance_by_one(batch, most):
    """Batch.advance() with a step that a CUDA graph can repeat."""
    batch.step(graph=True)
    return 1


@pytest.mark.parametrize("sampling", WAYS, ids=["greedy", "penalised", "sampled", "filtered"])
@pytest.mark.parametrize("blocks", FAMILIES)
def test_the_step_that_a_cuda_graph_repeats_writes_the_same(blocks, sampling, monkeypatch):
    decoder = Decoder(make_model(blocks).double())
    arguments = (decoder, PROMPTS + LONG, 40, EOT, sampling, list(range(7)))
    expected = generate_all(*arguments)
    monkeypatch.setattr(Batch, "advance", advance_by_one)
    assert generate_all(*arguments) == expected


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_steps_in_which_a_cuda_graph_looked_at_too_few_tokens_are_repeated(penalty, monkeypatch):
    decoder = Decoder(make_model("modern", noise=0.2).double())
    sampling = Sampling(temperature=0.9, top_p=0.8, repetition_penalty=penalty)
    arguments = (decoder, PROMPTS + LONG, 40, EOT, sampling, list(range(7)))
    expected = generate_all(*arguments)
    repeated = []

    def advance(self, most):
        self.step(graph=True, short=self.short)
        self.replayed += 1
        return 1

    def step(self, graph=False, short=None, step=Batch.step):
        repeated.append(short is None)
        step(self, graph, short)

    monkeypatch.setattr(generation, "LIKELIEST", 8)
    monkeypatch.setattr(generation, "UNCHECKED", 3)
    monkeypatch.setattr(Batch, "advance", advance)
    monkeypatch.setattr(Batch, "step", step)
    decoder.graphs = True
    assert generate_all(*arguments) == expected
    assert 0 < sum(repeated) <= repeated.count(False)
    repeated.clear()
    monkeypatch.setattr(Batch, "settle", lambda self: None)
    assert generate_all(*arguments) != expected and not any(repeated)


def test_where_no_cuda_graph_can_be_recorded_it_warns_once_and_goes_on(monkeypatch, capsys):
    decoder = Decoder(make_model("modern").double())
    arguments = (decoder, PROMPTS + LONG, 40, EOT, WAYS[1], list(range(7)))
    expected = generate_all(*arguments)

    def capture(self, *state):
        self.step(graph=True)  # a rehearsal, after which the recording fails
        raise RuntimeError("operation not permitted when stream is capturing\nsome more")

    monkeypatch.setattr(Batch, "capture", capture)
    decoder.graphs = True
    assert generate_all(*arguments) == expected
    assert capsys.readouterr().err == (
        "warning: CUDA graph capture failed, continuing without it: "
        "operation not permitted when stream is capturing\n"
    )


@pytest.mark.parametrize("block_size", [1, 2, 3, 5])
def test_small_and_odd_contexts_slide_too(block_size):
    model = make_model("modern", block_size=block_size)
    for seed, prompt in enumerate(PROMPTS):
        written = generate_all(Decoder(model), [prompt], 12, EOT, WAYS[2], [seed])[0]
        assert written == continue_without_cache(model, prompt, 12, WAYS[2], seed)


@pytest.mark.parametrize("blocks", FAMILIES)
def test_a_long_prefill_goes_in_pieces(blocks, monkeypatch):
    decoder, fed = Decoder(make_model(blocks)), []
    arguments = ([LONG[1][:14], LONG[1][1:14], LONG[1]], 20, EOT, WAYS[2], [1, 2, 3])
    whole = generate_all(decoder, *arguments)
    monkeypatch.setattr("model.generation.PREFILL_TOKENS", 12)
    call = Decoder.__call__
    monkeypatch.setattr(
        Decoder, "__call__", lambda self, ids, *rest: [fed.append(ids.numel()), call(self, ids, *rest)][1]
    )
    assert generate_all(decoder, *arguments) == whole
    assert max(fed) == 12


@pytest.mark.parametrize("block_size", [1, 2, 3, 16])
def test_what_lies_before_the_context_is_not_needed(block_size):
    decoder = Decoder(make_model("modern", block_size=block_size))
    prompt = [k % 29 for k in range(1, 60)]
    for length in range(1, len(prompt)):
        begin = context_start(length, block_size)
        assert length - begin <= block_size and (begin == 0) == (length <= block_size)
        whole, end = (
            generate_all(decoder, [ids], 2 * block_size, EOT, WAYS[2], [1])
            for ids in (prompt[:length], prompt[begin:length])
        )
        assert whole == end


@pytest.mark.parametrize("max_tokens", [1, 2, 15, 16, 17, 33])
def test_max_tokens_counts_each_sequence_for_itself(max_tokens):
    model = make_model("modern")
    decoder = FakeDecoder(model, ever_on)
    for prompts in ([PROMPTS[0]], PROMPTS + LONG):
        written = generate_all(decoder, prompts, max_tokens, EOT, GREEDY, [0] * len(prompts))
        assert [len(ids) for ids in written] == [max_tokens] * len(prompts)


class FakeDecoder(Decoder):
    """Answers the last token by a rule instead of a network."""

    def __init__(self, model, rule):
        super().__init__(model)
        self.rule, self.network = rule, None

    def __call__(self, idx, cache, graph=False):
        cache.length += idx.shape[1]
        return self.rule(idx)


def ever_on(idx):
    return torch.nn.functional.one_hot(torch.full((len(idx),), 7), 29).float()


def counting(idx):
    """A model that has learned to count: 3 is followed by 4, and 28 by the end, 0."""
    return 100.0 * torch.nn.functional.one_hot((idx[:, -1] + 1) % 29, 29).float()


def test_each_position_yields_what_each_sequence_wrote_there():
    decoder = FakeDecoder(make_model("modern"), counting)
    steps = list(generate(decoder, [[24], [1, 2, 26], [28], [1, 2, 3]], 4, EOT, GREEDY, [0] * 4))
    assert steps == [
        [25, None, None, None],  # position 1: the third has ended at once, two are still reading
        [26, None, None, None],
        [27, 27, None, 4],
        [28, 28, None, 5],  # the first has its four
        [None, None, None, 6],  # the second has come to its end
        [None, None, None, 7],
    ]


def test_seeds_decide_what_is_sampled():
    model = make_model("modern")
    sampling = Sampling(temperature=1.0, top_p=1.0)

    def sample(seed):
        return generate_all(Decoder(model), [[EOT]], 20, 28, sampling, [seed])[0]

    assert sample(1) == sample(1) and len({tuple(sample(seed)) for seed in range(8)}) == 8


def test_one_seed_after_another_draws_from_the_distribution():
    model, sampling, count = make_model("modern"), Sampling(temperature=1.3, top_p=0.9), 4_000
    firsts = generate_all(Decoder(model), [[3, 4]] * count, 1, -1, sampling, list(range(count)))
    logits = model(torch.tensor([[3, 4]]))[:, -1].detach()
    expected = distribution(logits, None, sampling)[0]
    assert_drawn_from(torch.tensor(firsts)[:, 0], expected)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_generators_do_not_take_is_a_user_error(seed):
    model = make_model("modern")
    with pytest.raises(UserError, match=f"seed must be .*, not {seed}"):
        generate_all(Decoder(model), [[EOT]] * 2, 1, EOT, GREEDY, [0, seed])
    assert generate_all(Decoder(model), [[EOT]] * 2, 1, EOT, GREEDY, [0, 2**63 - 1])


# Text


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE of a few sentences: `ö` and `🐉` are tokens of one byte each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Once upon a time there was a cat.", "The cat sat on the mat."], trainer)
    return text_tokenizer(tokenizer.to_str())


def test_a_streamed_story_keeps_the_spaces_that_tokens_only_mark(monkeypatch, capsys):
    """As in tokenizers that are not byte-level: a story's first token begins with a space only after a prompt."""
    vocabulary = {word: k for k, word in enumerate(["<|endoftext|>", "▁Once", "▁upon", "▁a", "▁time", "."])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    monkeypatch.setattr(script, "generate", lambda *_: ([token] for token in [2, 3, 4, 5, None]))
    config = GPTConfig(vocab_size=6, block_size=16, n_layer=1, n_head=1, n_embd=4)
    row = script.Writer(Decoder(GPT(config)), tokenizer, EOT, GREEDY, max_tokens=100).stream("Once", seed=3)
    assert capsys.readouterr().out == "Once upon a time.\n" and row["story"] == " upon a time."


@pytest.mark.parametrize("text", [" a cat.", " Zoë saw a 🐉!", "🐉", " ends in half: \udcf0"])
def test_a_streamed_story_is_the_story(tokenizer, monkeypatch, capsys, text):
    ids = tokenizer.encode(text.replace("\udcf0", "🐉"), add_special_tokens=False).ids
    if "\udcf0" in text:
        ids = ids[:-1]  # cut within a character
    monkeypatch.setattr(script, "generate", lambda *_: ([token] for token in [None, *ids, None]))
    config = GPTConfig(vocab_size=300, block_size=16, n_layer=1, n_head=1, n_embd=4)
    writer = script.Writer(Decoder(GPT(config)), tokenizer, EOT, GREEDY, max_tokens=100)
    row = writer.stream("Once", seed=3)
    story = tokenizer.decode(ids)
    assert capsys.readouterr().out == f"Once{story}\n"
    reason = "end_of_story"
    assert row == {"prompt": "Once", "story": story, "tokens": len(ids), "seed": 3, "finish_reason": reason}
