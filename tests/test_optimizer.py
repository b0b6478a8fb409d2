"""Muon and AdamW against torch's own, the groups, and the learning-rate schedule."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn

from model.config import GPTConfig, Recipe
from model.gpt import GPT
from model.optimizer import (
    NEWTON_SCHULZ,
    Muon,
    learning_rate,
    make_optimizers,
    orthogonalise,
    set_rates,
)

torch.set_num_threads(1)

FAMILIES = ("modern", "gpt2")
SHAPES = [(64, 64), (64, 64), (192, 48), (48, 192), (40, 40)]


def make_parameters(shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def make_model(blocks, **changes):
    torch.manual_seed(0)
    shape = {"vocab_size": 53, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32, "blocks": blocks}
    return GPT(GPTConfig(**{**shape, **changes}))


def give_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def movements(optimizer, parameters, steps=6):
    """Where `steps` steps with the same made-up gradients bring the parameters from where they are."""
    before = [parameter.detach().clone() for parameter in parameters]
    for step in range(steps):
        give_gradients(parameters, seed=100 + step)
        optimizer.step()
    return [parameter.detach() - old.detach() for parameter, old in zip(parameters, before, strict=True)]


def relative_error(ours, expected):
    return ((ours - expected).norm() / expected.norm()).item()


# Muon


@pytest.mark.parametrize("low_precision", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_muon_follows_torchs(weight_decay, low_precision):
    """Within 2 %: torch computes directions in bfloat16, whose 8 bits round otherwise in another order."""
    parameters, others = make_parameters(), make_parameters()
    ours = Muon([{"params": parameters}], 0.02, weight_decay, low_precision=low_precision)
    theirs = torch.optim.Muon(
        others, lr=0.02, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for moved, expected in zip(movements(ours, parameters), movements(theirs, others), strict=True):
        assert relative_error(moved, expected) < 0.02


def test_muon_in_float32_is_its_formula():
    """Against a float64 computation, one matrix and one step at a time."""
    parameters = make_parameters()
    expected = [parameter.detach().double() for parameter in parameters]
    momenta = [torch.zeros_like(w) for w in expected]
    optimizer = Muon([{"params": parameters}], lr=0.02, weight_decay=0.1, low_precision=False)
    for step in range(5):
        give_gradients(parameters, seed=step)
        optimizer.step()
        for k, gradient in enumerate(p.grad.double() for p in parameters):
            momenta[k] = 0.95 * momenta[k] + 0.05 * gradient
            x = 0.05 * gradient + 0.95 * momenta[k]
            x = x / x.norm()
            for _ in range(5):
                a, b, c = NEWTON_SCHULZ
                gram = x @ x.T
                x = a * x + (b * gram + c * gram @ gram) @ x
            length = 0.2 * max(x.shape) ** 0.5
            expected[k] = expected[k] * (1 - 0.02 * 0.1) - 0.02 * length * x
    for parameter, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows, columns", [(3, 1), (1, 2), (2, 3)])
def test_each_piece_of_a_matrix_is_trained_as_if_it_stood_alone(rows, columns):
    (whole,) = make_parameters([(rows * 32, columns * 24)])

    def cut(matrix):
        return [piece for band in matrix.split(32) for piece in band.split(24, dim=1)]

    alone = [nn.Parameter(piece.detach().clone()) for piece in cut(whole)]
    together = Muon([{"params": [whole], "pieces": (rows, columns)}], lr=0.02, low_precision=False)
    apart = Muon([{"params": [piece]} for piece in alone], lr=0.02, low_precision=False)
    for step in range(4):
        give_gradients([whole], seed=step)
        for piece, gradient in zip(alone, cut(whole.grad), strict=True):
            piece.grad = gradient.clone()
        together.step()
        apart.step()
    for trained, expected in zip(cut(whole.detach()), alone, strict=True):
        torch.testing.assert_close(trained, expected.detach(), atol=1e-5, rtol=0)


def test_muon_passes_over_what_has_no_gradient():
    first, second = make_parameters([(8, 8), (8, 8)])
    old = second.detach().clone()
    optimizer = Muon([{"params": [first, second]}], lr=0.1)
    give_gradients([first], seed=0)
    optimizer.step()
    assert torch.equal(second, old) and second not in optimizer.state


def test_a_gpus_step_passes_over_infinite_gradients_without_looking():
    """As on a GPU, with `applied` in a tensor: 1 gives the usual step, 0 leaves everything as it is."""
    parameters, others = make_parameters(SHAPES[:2]), make_parameters(SHAPES[:2])
    usual, ours = (Muon([{"params": each, "pieces": (2, 4)}], lr=0.1) for each in (parameters, others))
    give_gradients(parameters, seed=0)
    give_gradients(others, seed=0)
    usual.step()
    with torch.no_grad():
        ours.update(others, ours.param_groups[0], applied=torch.tensor(1.0))
    for one, another in zip(others, parameters, strict=True):
        assert torch.equal(one, another)
    for parameter in others:
        parameter.grad[0, :2] = torch.tensor([torch.inf, torch.nan])
    momenta = [ours.state[parameter]["momentum"].clone() for parameter in others]
    with torch.no_grad():
        ours.update(others, ours.param_groups[0], applied=torch.tensor(0.0))
    for one, another, momentum in zip(others, parameters, momenta, strict=True):
        assert torch.equal(one, another) and torch.equal(ours.state[one]["momentum"], momentum)


@pytest.mark.parametrize("low_precision", [True, False])
@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 96, 32), (2, 32, 96), (1, 128, 128)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape, low_precision):
    matrices = 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)  # the same directions, sizes 0.1 to 1
    sizes = torch.linspace(0.1, 1, min(shape[1:]))
    x = u * sizes @ v
    result = orthogonalise(x.bfloat16() if low_precision else x).float()
    values = torch.linalg.svdvals(result)
    assert result.shape == shape and values.min() > 0.6 and values.max() < 1.3
    cosine = (result * (u @ v)).sum((1, 2)) / result.norm(dim=(1, 2)) / (u @ v).norm(dim=(1, 2))
    assert (cosine > 0.97).all()  # and they point where the nearest orthogonal matrix points


def test_no_direction_comes_from_no_gradient():
    assert torch.equal(orthogonalise(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))


def test_an_update_is_as_long_as_adamws():
    parameters = make_parameters([(64, 64), (192, 48), (48, 192)])
    optimizer = Muon([{"params": parameters}], lr=0.01, weight_decay=0.0)
    for moved in movements(optimizer, parameters, steps=1):
        assert moved.pow(2).mean().sqrt().item() == pytest.approx(0.01 * 0.2, rel=0.2)


# The groups that a model is trained in


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("blocks", FAMILIES)
def test_every_parameter_is_in_exactly_one_group(blocks, tied, optimizer):
    model = make_model(blocks, tie_weights=tied)
    optimizers = make_optimizers(model, Recipe(optimizer=optimizer), low_precision=True)
    assert len(optimizers) == (2 if optimizer == "muon" else 1)
    trained = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("blocks", FAMILIES)
@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, {"qkv": (6, 1), "gate_up": (16, 1), "proj": (1, 1), "up": (8, 1), "down": (1, 8)}),
        ({"n_head": 1}, {"qkv": (3, 1), "gate_up": (16, 1), "proj": (1, 1), "up": (8, 1), "down": (1, 8)}),
        ({"n_inner": 36}, {"qkv": (6, 1), "gate_up": (2, 1), "proj": (1, 1), "up": (1, 1), "down": (1, 1)}),
    ],
)
def test_muon_trains_the_matrices_of_the_blocks_in_pieces(blocks, changes, expected):
    model = make_model(blocks, tie_weights=False, **changes)
    muon, _ = make_optimizers(model, Recipe(optimizer="muon"), low_precision=True)
    pieces = {id(p): group["pieces"] for group in muon.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        matrix_of_a_block = name.startswith("blocks.") and parameter.dim() == 2
        wanted = expected[name.split(".")[-2]] if matrix_of_a_block else None
        assert pieces.get(id(parameter)) == wanted, name


def test_no_piece_holds_both_queries_and_keys():
    """Grouped heads: 4 of queries, 2 of keys and 2 of values, in pieces of one head."""
    model = make_model("modern", n_head=4, n_kv_head=2)
    muon, _ = make_optimizers(model, Recipe(optimizer="muon"), low_precision=True)
    qkv = model.blocks[0].attention.qkv.weight
    (pieces,) = {group["pieces"] for group in muon.param_groups if any(p is qkv for p in group["params"])}
    assert pieces == (8, 1) and qkv.size(0) == 8 * model.config.head_dim


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("blocks", FAMILIES)
def test_weight_decay_shrinks_matrices_and_embeddings_only(blocks, optimizer):
    model = make_model(blocks, tie_weights=False)
    recipe = Recipe(optimizer=optimizer, learning_rate=0.1, weight_decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizers = make_optimizers(model, recipe, low_precision=False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for each in optimizers:
        each.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if parameter.dim() == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


@pytest.mark.parametrize("blocks", FAMILIES)
def test_adamw_is_torchs(blocks):
    model, other = make_model(blocks), make_model(blocks)
    recipe = Recipe(optimizer="adamw", learning_rate=1e-2, weight_decay=0.1)
    (ours,) = make_optimizers(model, recipe, low_precision=True)
    shapes = {True: [], False: []}
    for parameter in other.parameters():
        shapes[parameter.dim() >= 2].append(parameter)
    theirs = torch.optim.AdamW(
        [{"params": shapes[True], "weight_decay": 0.1}, {"params": shapes[False], "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
        foreach=False,
        fused=False,
    )
    moved = movements(ours, list(model.parameters()))
    expected = movements(theirs, list(other.parameters()))
    for one, another in zip(moved, expected, strict=True):
        torch.testing.assert_close(one, another, atol=1e-6, rtol=1e-4)


def test_all_parameters_follow_the_schedule():
    recipe = Recipe(bigram_start=False)
    optimizers = make_optimizers(make_model("modern"), recipe, low_precision=True)
    set_rates(optimizers, 0.3, step=0)
    assert {group["lr"] for optimizer in optimizers for group in optimizer.param_groups} == {0.3}


def test_where_embeddings_know_bigrams_their_rate_rises_slowly():
    muon, adamw = make_optimizers(make_model("modern"), Recipe(), low_precision=True)
    for step, part in {0: 0.005, 99: 0.5, 199: 1.0, 5_000: 1.0}.items():
        set_rates([muon, adamw], 0.3, step)
        assert {group["lr"] for group in muon.param_groups} == {0.3}
        assert [group["lr"] for group in adamw.param_groups] == pytest.approx([0.3 * part] * 2)
    (alone,) = make_optimizers(make_model("modern"), Recipe(optimizer="adamw"), low_precision=True)
    set_rates([alone], 0.3, 0)
    assert {group["lr"] for group in alone.param_groups} == {0.3}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("blocks", FAMILIES)
def test_a_restored_state_goes_on_bit_for_bit(blocks, optimizer, tmp_path):
    recipe = Recipe(optimizer=optimizer, learning_rate=0.01)
    model = make_model(blocks)
    optimizers = make_optimizers(model, recipe, low_precision=True)

    def train(model, optimizers, steps):
        for step in steps:
            give_gradients(list(model.parameters()), seed=step)
            set_rates(optimizers, 0.01 / (1 + step), step)
            for each in optimizers:
                each.step()

    train(model, optimizers, range(3))
    torch.save([each.state_dict() for each in optimizers], tmp_path / "state.pt")
    copied = copy.deepcopy(model)
    resumed = make_optimizers(copied, recipe, low_precision=True)
    for each, state in zip(resumed, torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        each.load_state_dict(state)
    train(model, optimizers, range(3, 6))
    train(copied, resumed, range(3, 6))
    for one, another in zip(model.parameters(), copied.parameters(), strict=True):
        assert torch.equal(one, another)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("blocks", FAMILIES)
def test_a_model_learns_a_sequence_by_heart(blocks, optimizer):
    model = make_model(blocks)
    recipe = Recipe(optimizer=optimizer, learning_rate=0.01)
    optimizers = make_optimizers(model, recipe, low_precision=False)
    ids = torch.randint(53, (4, 17), generator=torch.Generator().manual_seed(0))
    for _ in range(60):
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
    assert loss.item() < 0.5  # of ln 53 = 3.97 at the start


def test_momentum_rises_and_stays():
    model = make_model("modern")
    muon, adamw = make_optimizers(model, Recipe(), low_precision=True)
    expected = {0: 0.85, 150: 0.90, 300: 0.95, 20_000: 0.95}
    for step, momentum in expected.items():
        set_rates([muon, adamw], 0.1, step)
        assert all(group["momentum"] == pytest.approx(momentum) for group in muon.param_groups)
        assert all(group["betas"] == (0.7, 0.99) for group in adamw.param_groups)


# The learning rate


def rates(steps=1_000, **changes):
    recipe = dataclasses.replace(Recipe(learning_rate=2.0), **changes)
    return [learning_rate(recipe, step, step / steps) for step in range(steps + 1)]


def test_the_rate_rises_in_a_line_over_the_warmup():
    values = rates(warmup_steps=100, decay_fraction=0.5)
    assert values[:100] == pytest.approx([2.0 * (step + 1) / 100 for step in range(100)])
    assert values[99] == 2.0


def test_without_warmup_the_first_step_has_the_whole_rate():
    assert rates(warmup_steps=0, decay_fraction=0.5)[0] == 2.0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize("fraction", [0.2, 0.6, 1.0])
def test_the_rate_stays_and_then_falls_to_its_end(schedule, final, fraction):
    values = rates(warmup_steps=0, schedule=schedule, decay_fraction=fraction, final_learning_rate=final)
    begin = round(1_000 * (1 - fraction))
    assert values[: begin + 1] == pytest.approx([2.0] * (begin + 1))
    assert values[-1] == pytest.approx(2.0 * final, abs=1e-12)
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))
    assert all(later < earlier for earlier, later in itertools.pairwise(values[begin + 1 :]))
    assert values[(begin + 1_000) // 2] == pytest.approx((2.0 + 2.0 * final) / 2)  # half way down
    quarter = {"linear": 0.75, "cosine": (1 + 2**-0.5) / 2}[schedule]
    at_a_quarter = values[begin + (1_000 - begin) // 4]
    assert at_a_quarter == pytest.approx(2.0 * (final + (1 - final) * quarter))


def test_cosine_is_torchs():
    values = rates(warmup_steps=0, schedule="cosine", decay_fraction=1.0, final_learning_rate=0.1)
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=1_000, eta_min=0.2)
    for value in values:
        assert value == pytest.approx(scheduler.get_last_lr()[0], rel=1e-6)
        sgd.step()
        scheduler.step()


def test_time_that_overshoots_ends_at_the_end():
    assert learning_rate(Recipe(final_learning_rate=0.0), 10_000, 1.3) == 0.0
