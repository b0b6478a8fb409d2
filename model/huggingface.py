"""Convert models to and from Hugging Face's format.

A folder holds config.json (the shape), *.safetensors (the weights) and tokenizer.json. Modern blocks are Qwen3's
and become a Qwen3ForCausalLM, gpt2 blocks a GPT2LMHeadModel.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from model.checkpoint import all_checkpoints, find_checkpoint, load_checkpoint, load_model
from model.config import NORM_EPS, GPTConfig
from model.errors import UserError, first_line, needs, require
from model.gpt import GPT
from model.hub import HUB_NAME, hub_errors
from model.tokenizer import END_OF_TEXT, require_room, text_tokenizer

# Our modules -> theirs, {} is the layer. If there are several, ours is one matrix with the rows of all.
MODULES = {
    "gpt2": {
        "token_embedding": ["transformer.wte"],
        "position_embedding": ["transformer.wpe"],
        "blocks.{}.attention_norm": ["transformer.h.{}.ln_1"],
        "blocks.{}.attention.qkv": ["transformer.h.{}.attn.c_attn"],
        "blocks.{}.attention.proj": ["transformer.h.{}.attn.c_proj"],
        "blocks.{}.mlp_norm": ["transformer.h.{}.ln_2"],
        "blocks.{}.mlp.up": ["transformer.h.{}.mlp.c_fc"],
        "blocks.{}.mlp.down": ["transformer.h.{}.mlp.c_proj"],
        "norm": ["transformer.ln_f"],
        "head": ["lm_head"],
    },
    "modern": {
        "token_embedding": ["model.embed_tokens"],
        "blocks.{}.attention_norm": ["model.layers.{}.input_layernorm"],
        "blocks.{}.attention.qkv": [f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkv"],
        "blocks.{}.attention.q_norm": ["model.layers.{}.self_attn.q_norm"],
        "blocks.{}.attention.k_norm": ["model.layers.{}.self_attn.k_norm"],
        "blocks.{}.attention.proj": ["model.layers.{}.self_attn.o_proj"],
        "blocks.{}.mlp_norm": ["model.layers.{}.post_attention_layernorm"],
        "blocks.{}.mlp.gate_up": [f"model.layers.{{}}.mlp.{x}_proj" for x in ("gate", "up")],
        "blocks.{}.mlp.down": ["model.layers.{}.mlp.down_proj"],
        "norm": ["model.norm"],
        "head": ["lm_head"],
    },
}

# transformers stores GPT-2's matrices as (in, out)
TRANSPOSED = re.compile(r".*\.c_(attn|proj|fc)\.weight")

# Constants and masks that older files store with the weights
NOT_WEIGHTS = re.compile(r".*(\.attn\.(masked_)?bias|rotary_emb\.inv_freq)")


# The weights


def our_tensors(config: GPTConfig) -> Iterator[tuple[str, torch.Size, list[str]]]:
    """Each of our tensors: its name, its shape, and transformers' names for it."""
    with torch.device("meta"):  # shapes only, no memory
        model = GPT(config)
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        layer = "".join(re.findall(r"\d+", module))
        theirs = MODULES[config.blocks][re.sub(r"\d+", "{}", module)]
        yield name, tensor.shape, [f"{their.format(layer)}.{kind}" for their in theirs]


def to_huggingface(weights: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Our weights with transformers' names and shapes."""
    tensors = {}
    for name, _, theirs in our_tensors(config):
        rows = len(weights[name]) // len(theirs)
        if len(theirs) == 3:  # q, k and v
            rows = [heads * config.head_dim for heads in (config.n_head, config.kv_heads, config.kv_heads)]
        for their, part in zip(theirs, weights[name].split(rows), strict=True):
            part = part.T if TRANSPOSED.fullmatch(their) else part
            tensors[their] = part.clone(memory_format=torch.contiguous_format)
    return tensors


def from_huggingface(tensors: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """The inverse of to_huggingface, in float32. Raises UserError if a tensor is missing or unexpected."""
    if config.blocks == "gpt2":  # the hub's gpt2 uses the names of the headless model
        tensors = {
            name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
            for name, tensor in tensors.items()
        }
    tensors = {name: tensor for name, tensor in tensors.items() if not NOT_WEIGHTS.fullmatch(name)}
    if config.tie_weights:
        tensors.pop("lm_head.weight", None)
    weights = {}
    for name, shape, theirs in our_tensors(config):
        missing = [their for their in theirs if their not in tensors]
        require(not missing, f"missing tensors in the weights: {', '.join(missing)}")
        parts = [tensors.pop(their).float() for their in theirs]
        weights[name] = torch.cat([parts[0].T] if TRANSPOSED.fullmatch(theirs[0]) else parts)
        found = tuple(weights[name].shape)
        require(found == shape, f"{theirs[0]} has shape {found}, but config.json implies {tuple(shape)}")
    require(not tensors, f"unexpected tensors in the weights: {', '.join(list(tensors)[:3])}")
    return weights


# The shape


def to_config_json(config: GPTConfig, eot_id: int) -> dict:
    """The content of config.json for one of our models."""
    common = {
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_weights,
        "initializer_range": 0.02,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
    }
    if config.blocks == "gpt2":
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_positions": config.block_size,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_embd": config.n_embd,
            "n_inner": config.n_hidden,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": NORM_EPS["gpt2"],
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            **{f"{place}_pdrop": config.dropout for place in ("embd", "attn", "resid")},
            **common,
        }
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "max_position_embeddings": config.block_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_hidden,
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPS["modern"],
        "attention_bias": False,
        "attention_dropout": config.attention_dropout,
        "use_sliding_window": False,
        "rope_theta": config.rope_base,  # for transformers before 5
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        **common,
    }


# config.json's names for GPTConfig's fields
FIELDS = {
    "gpt2": {"block_size": "n_positions", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd"},
    "qwen3": {
        "block_size": "max_position_embeddings",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_kv_head": "num_key_value_heads",
        "head_size": "head_dim",
        "n_embd": "hidden_size",
        "n_inner": "intermediate_size",
    },
}
# Keys that may differ from our own config.json, because they do not affect what the network computes
MAY_DIFFER = re.compile("architectures|initializer_range|.*_token_id|.*_(dropout|pdrop)")


def from_config_json(theirs: dict) -> GPTConfig:
    """The shape in a config.json, without its dropout. Raises UserError if our blocks do not support it."""
    kind = theirs.get("model_type")
    require(kind in FIELDS, f"it is a {kind} model, but only gpt2 and qwen3 models are supported")
    names = {"vocab_size": "vocab_size", **FIELDS[kind]}
    missing = [name for name in names.values() if name not in theirs]
    require(not missing, f"config.json lacks {', '.join(missing)}")
    fields = {ours: theirs[name] for ours, name in names.items()}
    if kind == "gpt2":
        fields |= {"blocks": "gpt2", "n_inner": theirs.get("n_inner")}
    else:  # its place varies between transformers versions
        rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
        fields["rope_base"] = float(rope.get("rope_theta") or theirs.get("rope_theta", 10_000.0))
        rotary = rope.get("rope_type", rope.get("type", "default"))
        require(rotary == "default", f"its rotary positions are of type {rotary}, which is not supported")
    config = GPTConfig(**fields, tie_weights=theirs.get("tie_word_embeddings", kind == "gpt2"))
    odd = [
        f"{name} {theirs[name]} (not {value})"
        for name, value in to_config_json(config, eot_id=0).items()
        if theirs.get(name) not in (None, value) and not MAY_DIFFER.fullmatch(name) and "rope" not in name
    ]
    require(not odd, f"unsupported values in config.json: {', '.join(odd)}")
    return config


# A folder, or a model on the hub


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """An existing model that a run can start from."""

    config: GPTConfig
    weights: dict[str, Tensor]
    tokenizer_json: str

    def with_context(self, block_size: int) -> "Pretrained":
        """The same with another context: rotary positions are unlimited, learned ones can only be cut."""
        learned = self.config.block_size
        fits = self.config.blocks == "modern" or block_size <= learned
        require(fits, f"--block-size {block_size} exceeds the {learned} positions that the model has learned")
        name, config = "position_embedding.weight", dataclasses.replace(self.config, block_size=block_size)
        cut = {name: self.weights[name][:block_size]} if name in self.weights else {}
        return dataclasses.replace(self, config=config, weights=self.weights | cut)


def find_pretrained(name: str, *patterns: str) -> Path:
    """The folder of a path or hub name; from the hub, files that match these patterns are downloaded."""
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder
    hub_name = HUB_NAME.fullmatch(name) and not folder.exists()
    require(hub_name, f"{name} is not a folder or the name of a model on the Hugging Face hub")
    with hub_errors(f"{name} (no folder here)", "give the folder of a model"):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=list(patterns)))


def checkpoint_file(name: str) -> Path | None:
    """The checkpoint that a name refers to by its own path or its folder's, or None."""
    path = Path(os.path.expanduser(name))
    if path.is_dir() and all_checkpoints(path):
        return find_checkpoint(path, None, prefer="best")
    return path if path.is_file() else None


def load_tokenizer_json(name: str) -> str:
    """The tokenizer of anything that load_pretrained accepts."""
    if file := checkpoint_file(name):
        return load_checkpoint(file)["tokenizer"]
    path = find_pretrained(name, "tokenizer.json") / "tokenizer.json"
    require(path.is_file(), f"{name} has no tokenizer.json")
    try:
        return text_tokenizer(path.read_text(encoding="utf-8")).to_str(pretty=True)
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"{path} is not a tokenizer: {first_line(error)}") from None


def load_pretrained(name: str) -> Pretrained:
    """Load a GPT-2 or Qwen3 model from a folder or the hub, or one of our checkpoints, or the best in a folder.

    Raises UserError if it is missing or not supported.
    """
    if file := checkpoint_file(name):
        model, _, checkpoint = load_model(file)
        return Pretrained(model.config, model.state_dict(), checkpoint["tokenizer"])
    load_file = needs("safetensors.torch", name).load_file
    folder = find_pretrained(name, "config.json", "tokenizer.json", "model*.safetensors")
    files = sorted(folder.glob("model*.safetensors"))
    require((folder / "config.json").is_file(), f"{name} has no config.json")
    require(files, f"{name} has no model.safetensors; other weight formats are not supported")
    try:
        config = from_config_json(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        tensors = {}
        for file in files:
            tensors |= load_file(file)
        weights = from_huggingface(tensors, config)
    except UserError as error:
        raise UserError(f"{name} cannot be used: {error}") from None
    except Exception as error:  # of json or safetensors
        raise UserError(f"{name} does not load: {first_line(error)}") from None
    return Pretrained(config, weights, load_tokenizer_json(name))


def load_pretrained_model(name: str, device: torch.device, context: int) -> tuple[GPT, Tokenizer, int]:
    """A model of load_pretrained() in evaluation mode on the device, its tokenizer, and its end-of-text token.

    A longer context than `context` is cut to that: each position takes memory in every layer.
    """
    pretrained = load_pretrained(name)
    pretrained = pretrained.with_context(min(context, pretrained.config.block_size))
    tokenizer = text_tokenizer(pretrained.tokenizer_json)
    eot_id = tokenizer.token_to_id(END_OF_TEXT)
    require(
        eot_id is not None, f"the tokenizer of {name} has no {END_OF_TEXT} token, with which stories begin"
    )
    require_room(pretrained.config.vocab_size, tokenizer, name)
    model = GPT(pretrained.config)
    model.load_state_dict(pretrained.weights)
    return model.to(device).eval(), tokenizer, eot_id
