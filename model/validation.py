"""What train.py does at each evaluation: the loss on validation windows, and a sample story."""

import math
from types import SimpleNamespace

import numpy as np
import torch

from model.batches import Data, number_stories, to_device
from model.decoder import Decoder
from model.generation import DEFAULT_SAMPLING, generate_all, text_tokenizer
from model.gpt import GPT
from model.runtime import Runtime, tokens_at_once


@torch.no_grad()
def validate(
    model: GPT, validation: np.ndarray, data: Data, runtime: Runtime, mask_stories: bool
) -> dict[str, float]:
    """Mean loss over the validation windows, in nats per token and in bits per byte of text."""
    model.eval()
    total = 0.0
    config = model.config
    chunk = max(1, tokens_at_once(runtime.device, config.vocab_size) // config.block_size)
    for first in range(0, len(validation), chunk):
        windows = to_device(validation[first : first + chunk], runtime.device)
        inputs, targets = windows[:, :-1], windows[:, 1:]
        story_ids = number_stories(inputs, data.eot_id) if mask_stories else None
        with runtime.autocast():
            total += model(inputs, targets, story_ids).item() * len(windows)
    model.train()
    loss = total / len(validation)
    return {
        "validation_loss": loss,
        "bits_per_byte": loss / math.log(2) / data.validation.bytes_per_token,
    }


def write_sample(model: GPT, data: Data, settings: SimpleNamespace) -> str:
    """A story from the sample prompt, with the same seed at each evaluation."""
    if not settings.sample_tokens:
        return ""
    tokenizer = text_tokenizer(data.tokenizer_json)
    ids = [data.eot_id, *tokenizer.encode(settings.sample_prompt, add_special_tokens=False).ids]
    strict = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)  # sampling's cumulative sums have no deterministic CUDA kernel
    (written,) = generate_all(
        Decoder(model), [ids], settings.sample_tokens, data.eot_id, DEFAULT_SAMPLING, [settings.seed]
    )
    torch.use_deterministic_algorithms(strict, warn_only=warns)
    return tokenizer.decode(ids[1:] + written, skip_special_tokens=False)
