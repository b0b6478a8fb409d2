"""Optimizers, which parameters each trains, and the learning-rate schedule."""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from model.config import GPTConfig, Recipe

# Coefficients of the quintic Newton-Schulz iteration (Jordan et al. 2024), as in torch.optim.Muon
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# Warm-up steps of AdamW alongside Muon after a bigram start: embedding and head are ahead of the untrained blocks
BIGRAM_WARMUP = 200


@torch.no_grad()
def orthogonalise(matrices: Tensor) -> Tensor:
    """Approximately the nearest (semi-)orthogonal matrices, (N, rows, columns) -> the same shape.

    Singular values end up between about 0.7 and 1.2, which is close enough for training.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum for matrices (Jordan et al. 2024).

    A group's `pieces`, (rows, columns), says into how many equal pieces each of its matrices is cut along either
    dimension, by default (1, 1). Each piece is orthogonalised separately, batched with all others of its shape. An
    update has RMS 0.2, like AdamW's (Liu et al. 2025), so learning rate and weight decay carry over. With
    `low_precision`, products are in bfloat16, as in torch.optim.Muon. If the tensor `found_inf` is 1, a step
    changes nothing, without waiting for the GPU, as in PyTorch's fused optimizers.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict], lr: float, weight_decay: float = 0.1, low_precision: bool = True):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95, "pieces": (1, 1)}
        super().__init__(groups, defaults)
        self.low_precision = low_precision

    @torch.no_grad()
    def step(self) -> None:
        skip = self.found_inf
        on_gpu = skip is not None and skip.device.type != "cpu"  # looking at its value would mean waiting
        if not on_gpu and skip:
            return
        applied = 1 - skip if on_gpu else 1.0  # 0 if the step must change nothing
        for group in self.param_groups:
            same_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    same_shape[parameter.shape].append(parameter)
            for parameters in same_shape.values():
                self.update(parameters, group, applied)

    def update(self, parameters: list[Tensor], group: dict, applied: Tensor | float) -> None:
        """A step for parameters of the same shape, in few operations for all together; if `applied` is 0, no step."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters]
        if isinstance(applied, Tensor):  # a momentum that moves towards itself stays where it is
            gradients = torch.where(applied > 0, torch.stack(gradients), torch.stack(momenta)).unbind()
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        directions = torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"]))
        pieces = cut(directions.bfloat16() if self.low_precision else directions, *group["pieces"])
        steps = join(orthogonalise(pieces) * applied, *group["pieces"]).to(directions.dtype)
        scale = 0.2 * math.sqrt(max(pieces.shape[1:]))
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"] * applied)
        torch._foreach_add_(parameters, steps.unbind(), alpha=-group["lr"] * scale)


def cut(matrices: Tensor, rows: int, columns: int) -> Tensor:
    """(N, R, C) -> the rows * columns equal pieces of each matrix, (N * rows * columns, R / rows, C / columns)."""
    return matrices.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).transpose(2, 3).flatten(0, 2)


def join(pieces: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of cut()."""
    return pieces.unflatten(0, (-1, rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def pieces_of(name: str, config: GPTConfig) -> tuple[int, int]:
    """Into how many pieces, along rows and columns, Muon cuts a matrix of a block.

    The matrices joined in qkv and gate_up are separate ones. Beyond that, smaller pieces take less time: queries,
    keys and values are cut in half between heads, the hidden units of the feed-forward layer in eighths. This halves
    the time of orthogonalisation, and the model learns nearly as much per token (benchmarks/RESULTS.md); cutting
    `proj`, or heads one by one, costs more.
    """
    halves = 2 if config.kv_heads % 2 == 0 else 1
    eighths = 8 if config.n_hidden % 8 == 0 else 1
    return {
        "qkv": ((config.n_head // config.kv_heads + 2) * halves, 1),
        "gate_up": (2 * eighths, 1),
        "up": (eighths, 1),
        "down": (1, eighths),
    }.get(name.split(".")[-2], (1, 1))


def make_optimizers(model: nn.Module, recipe: Recipe, low_precision: bool) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest.

    Weight decay applies to matrices and embeddings only.
    """
    muon: dict[tuple[int, int], list] = defaultdict(list)
    decayed, undecayed = [], []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            undecayed.append(parameter)
        elif recipe.optimizer == "muon" and name.startswith("blocks."):
            muon[pieces_of(name, model.config)].append(parameter)
        else:
            decayed.append(parameter)
    warmup = BIGRAM_WARMUP if muon and recipe.bigram_start else 1
    adamw = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": recipe.weight_decay, "warmup": warmup},
            {"params": undecayed, "weight_decay": 0.0, "warmup": warmup},
        ],
        lr=recipe.learning_rate,
        betas=(0.7, 0.99) if muon else (0.9, 0.95),  # alongside Muon, these measured better
        fused=True,
    )
    if not muon:
        return [adamw]
    groups = [{"params": parameters, "pieces": pieces} for pieces, parameters in muon.items()]
    return [Muon(groups, recipe.learning_rate, recipe.weight_decay, low_precision=low_precision), adamw]


def set_rates(optimizers: list[torch.optim.Optimizer], rate: float, step: int) -> None:
    """Set all groups' learning rate, reduced during a group's own warm-up, and Muon's momentum, for a step (counted
    from 0).

    The momentum rises from 0.85 to 0.95 over 300 steps, as in Jordan et al. 2024: the large gradients of the first
    steps should soon be forgotten.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / group.get("warmup", 1))
            if "momentum" in group:
                group["momentum"] = 0.85 + 0.1 * min(1.0, step / 300)


def learning_rate(recipe: Recipe, step: int, progress: float) -> float:
    """The learning rate of a step (counted from 0) at `progress` (0 to 1) through the run.

    It rises linearly over warmup_steps, stays constant, and over the last decay_fraction of the run falls to
    final_learning_rate times its peak, linearly or along a half cosine.
    """
    warmup = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
    fallen = min(1.0, max(0.0, (progress - (1 - recipe.decay_fraction)) / recipe.decay_fraction))
    if recipe.schedule == "cosine":
        fallen = (1 - math.cos(math.pi * fallen)) / 2
    return recipe.learning_rate * warmup * (1 - fallen * (1 - recipe.final_learning_rate))
