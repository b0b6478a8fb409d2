"""What train.py evaluates on the way: the loss on validation windows, and a sample story."""

import torch

from model.batches import to_device
from model.decoder import Decoder
from model.generation import generate_all
from model.gpt import GPT
from model.loss import bits_per_byte
from model.run import Run
from model.runtime import tokens_at_once
from model.sampling import Sampling
from model.tokenizer import readable, text_tokenizer


@torch.no_grad()
def validate(run: Run, model: GPT) -> dict[str, float]:
    """Mean loss over the validation windows, in nats per token and in bits per byte of text."""
    model.eval()
    total, runtime, config = 0.0, run.runtime, model.config
    chunk = max(1, tokens_at_once(runtime.device, config.vocab_size) // config.block_size)
    for first in range(0, len(run.validation_windows), chunk):
        windows = to_device(run.validation_windows[first : first + chunk], runtime.device)
        inputs, targets, story_ids = run.inputs_and_targets(windows)
        with runtime.autocast(), runtime.eager():
            total += model(inputs, targets, story_ids).item() * len(windows)
    model.train()
    loss = total / len(run.validation_windows)
    return {
        "validation_loss": loss,
        "bits_per_byte": bits_per_byte(loss, run.data.validation.bytes_per_token),
    }


def write_sample(run: Run, model: GPT) -> str:
    """A story from the sample prompt, with the same seed at each evaluation."""
    settings, eot_id = run.settings, run.data.eot_id
    if not settings.sample_tokens:
        return ""
    tokenizer = text_tokenizer(run.data.tokenizer_json)
    ids = [eot_id, *tokenizer.encode(readable(settings.sample_prompt), add_special_tokens=False).ids]
    # Sampling's cumulative sums have no deterministic CUDA kernel.
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        (written,) = generate_all(
            Decoder(model), [ids], settings.sample_tokens, eot_id, Sampling(), [settings.seed]
        )
    finally:
        torch.set_deterministic_debug_mode(mode)
    return tokenizer.decode(ids[1:] + written, skip_special_tokens=False)
