"""Models in Hugging Face's format: our weights under transformers' names, and back.

A folder there holds config.json (the shape), *.safetensors (the weights) and tokenizer.json. Modern blocks
are Qwen3's and become a Qwen3ForCausalLM, gpt2 blocks a GPT2LMHeadModel.
"""

import dataclasses
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from tokenizers import Tokenizer
from torch import Tensor

from model.checkpoint import load_checkpoint
from model.config import GPTConfig
from model.gpt import GPT
from model.settings import UserError, first_line, require

# Our modules -> theirs, {} being the layer. Where theirs are several, ours is one matrix of their rows.
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

# GPT-2's matrices are stored (in, out) there
TRANSPOSED = re.compile(r".*\.c_(attn|proj|fc)\.weight")

# Constants and masks that older files carry beside the weights
NO_WEIGHTS = re.compile(r".*(\.attn\.(masked_)?bias|rotary_emb\.inv_freq)")


def needs(package: str, purpose: str) -> ModuleType:
    """Import a package that only this needs. Raises UserError with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.partition(".")[0]
        raise UserError(f"{purpose} needs the package {name}: run pip install {name}") from None


# The weights


def our_tensors(config: GPTConfig) -> Iterator[tuple[str, torch.Size, list[str]]]:
    """Each of our tensors: its name, its shape, and transformers' names for it."""
    with torch.device("meta"):  # shapes without memory
        model = GPT(config)
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        layer = "".join(re.findall(r"\d+", module))
        theirs = MODULES[config.blocks][re.sub(r"\d+", "{}", module)]
        yield name, tensor.shape, [f"{their.format(layer)}.{kind}" for their in theirs]


def to_huggingface(weights: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Our weights under transformers' names and in its shapes."""
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
    """The inverse of to_huggingface, in float32. Raises UserError where a tensor is missing or odd."""
    if config.blocks == "gpt2":  # the hub's gpt2 has the names of the model without its head
        tensors = {
            name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
            for name, tensor in tensors.items()
        }
    tensors = {name: tensor for name, tensor in tensors.items() if not NO_WEIGHTS.fullmatch(name)}
    if config.tie_weights:
        tensors.pop("lm_head.weight", None)
    weights = {}
    for name, shape, theirs in our_tensors(config):
        missing = [their for their in theirs if their not in tensors]
        require(not missing, f"the weights lack {', '.join(missing)}")
        parts = [tensors.pop(their).float() for their in theirs]
        weights[name] = torch.cat([parts[0].T] if TRANSPOSED.fullmatch(theirs[0]) else parts)
        found = tuple(weights[name].shape)
        require(found == shape, f"{theirs[0]} has {found} where config.json means {tuple(shape)}")
    require(not tensors, f"the weights hold {', '.join(list(tensors)[:3])}, for which there is no place here")
    return weights


# The shape


def to_config_json(config: GPTConfig, eot_id: int) -> dict:
    """What config.json says of a model of ours."""
    common = {
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_weights,
        "initializer_range": 0.02,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "dtype": "float32",
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
            "layer_norm_epsilon": 1e-5,
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
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": config.dropout,
        "use_sliding_window": False,
        "rope_theta": config.rope_base,  # where transformers before 5 looks
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        **common,
    }


# What config.json calls GPTConfig's fields
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
# What may differ from our own config.json, because it is no part of what the network computes
FREE = re.compile("architectures|dtype|initializer_range|.*_token_id|.*_(dropout|pdrop)")


def from_config_json(theirs: dict) -> GPTConfig:
    """The shape in a config.json, without its dropout. Raises UserError where our blocks have no such shape."""
    kind = theirs.get("model_type")
    require(kind in FIELDS, f"it is a {kind} model, and only gpt2 and qwen3 models have these blocks")
    names = {"vocab_size": "vocab_size", **FIELDS[kind]}
    missing = [name for name in names.values() if name not in theirs]
    require(not missing, f"config.json lacks {', '.join(missing)}")
    fields = {ours: theirs[name] for ours, name in names.items()}
    if kind == "gpt2":
        fields |= {"blocks": "gpt2", "n_inner": theirs.get("n_inner")}
    else:  # transformers has moved the base
        rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
        fields["rope_base"] = float(rope.get("rope_theta") or theirs.get("rope_theta", 10_000.0))
        rotary = rope.get("rope_type", rope.get("type", "default"))
        require(rotary == "default", f"its rotary positions are of the kind {rotary}")
    config = GPTConfig(**fields, tie_weights=theirs.get("tie_word_embeddings", kind == "gpt2"))
    odd = [
        f"{name} {theirs[name]} (not {value})"
        for name, value in to_config_json(config, eot_id=0).items()
        if theirs.get(name) not in (None, value) and not FREE.fullmatch(name) and "rope" not in name
    ]
    require(not odd, f"it differs from the blocks here in {', '.join(odd)}")
    return config


# A folder, or a model on the hub


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model from elsewhere, to begin a run with."""

    config: GPTConfig
    weights: dict[str, Tensor]
    tokenizer_json: str

    def with_context(self, block_size: int) -> "Pretrained":
        """The same with another context: rotary positions have no end, learned ones can only be cut."""
        learned = self.config.block_size
        fits = self.config.blocks == "modern" or block_size <= learned
        require(fits, f"--block-size {block_size} exceeds the {learned} positions that it has learned")
        name, config = "position_embedding.weight", dataclasses.replace(self.config, block_size=block_size)
        cut = {name: self.weights[name][:block_size]} if name in self.weights else {}
        return dataclasses.replace(self, config=config, weights=self.weights | cut)


def find_pretrained(name: str, *patterns: str) -> Path:
    """The folder that a path or a hub name means; from the hub, the files of these patterns are downloaded."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    hub_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not folder.exists()
    require(bool(hub_name), f"{name} is neither a folder nor the name of a model on the Hugging Face hub")
    from huggingface_hub import snapshot_download

    from data.hub import reach_hub

    offline = reach_hub()
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # of the hub's client or of its HTTP library
        reason = offline or first_line(error)
        raise UserError(
            f"there is no folder {name}, and from the hub it cannot be loaded: {reason}"
        ) from None


def load_tokenizer_json(name: str) -> str:
    """The tokenizer of what load_pretrained takes."""
    if Path(name).is_file():
        return load_checkpoint(Path(name))["tokenizer"]
    path = find_pretrained(name, "tokenizer.json") / "tokenizer.json"
    require(path.is_file(), f"{name} has no tokenizer.json")
    try:
        return plain_tokenizer(path.read_text(encoding="utf-8")).to_str(pretty=True)
    except Exception as error:  # the tokenizers library raises the bare class
        raise UserError(f"{path} is not a tokenizer: {first_line(error)}") from None


def load_pretrained(name: str) -> Pretrained:
    """Read a GPT-2 or Qwen3 model from a folder or the hub, or a checkpoint of ours.

    Raises UserError where there is none, or where it does not fit.
    """
    if Path(name).is_file():
        checkpoint = load_checkpoint(Path(name))
        return Pretrained(GPTConfig(**checkpoint["config"]), checkpoint["weights"], checkpoint["tokenizer"])
    load_file = needs("safetensors.torch", "--init-from").load_file
    folder = find_pretrained(name, "config.json", "tokenizer.json", "model*.safetensors")
    files = sorted(folder.glob("model*.safetensors"))
    require((folder / "config.json").is_file(), f"{name} has no config.json")
    require(bool(files), f"{name} has no model.safetensors; weights in other formats are not read")
    try:
        config = from_config_json(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        tensors = {}
        for file in files:
            tensors |= load_file(file)
        weights = from_huggingface(tensors, config)
    except UserError as error:
        raise UserError(f"{name} does not fit: {error}") from None
    except Exception as error:  # of json and of safetensors
        raise UserError(f"{name} does not load: {first_line(error)}") from None
    return Pretrained(config, weights, load_tokenizer_json(name))


def plain_tokenizer(tokenizer_json: str) -> Tokenizer:
    """A tokenizer without what it adds around a text: it only cuts and numbers."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.post_processor = None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def token_table(tokenizer_json: str) -> tuple:
    """What decides which ids a text becomes: tokenizers with an equal one are the same."""
    parts = json.loads(Tokenizer.from_str(tokenizer_json).to_str())
    cut = {key: value for key, value in (parts["pre_tokenizer"] or {}).items() if key != "trim_offsets"}
    added = {token["content"]: token["id"] for token in parts["added_tokens"]}
    return parts["normalizer"], cut, parts["model"]["vocab"], parts["model"]["merges"], added
