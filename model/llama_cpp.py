"""Export a model as a GGUF file, the format of llama.cpp and tools built on it (ollama, LM Studio)."""

import json
from pathlib import Path
from types import ModuleType

from torch import Tensor

from model.config import NORM_EPS, GPTConfig
from model.errors import needs, require
from model.huggingface import TRANSPOSED
from model.tokenizer import splits_as_gpt2

SPACE = "\u2581"  # llama.cpp's spelling of a space if tokens are characters
BLOCK = 32  # weights that share a scale in q8_0
# gguf's names of what --dtype takes
KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
# Matrices that llama.cpp accepts only in float32
ALWAYS_FLOAT32 = ("position_embd.weight",)


def write_gguf(
    path: Path,
    tensors: dict[str, Tensor],
    config: GPTConfig,
    checkpoint: dict,
    dtype: str,
    name: str,
    description: str,
) -> None:
    """Write a model to a file. `tensors` come from to_huggingface; biases and norms stay in float32.

    Raises UserError if llama.cpp does not support the tokenizer or the shape, or gguf is not installed.
    """
    gguf = needs("gguf", "--format gguf")
    rows = {
        "n_embd": config.n_embd,
        "n_inner": config.n_hidden,
        "n_head x head_size": config.n_head * config.head_dim,
    }
    for what, length in rows.items():
        packs = dtype != "q8_0" or length % BLOCK == 0
        require(
            packs,
            f"q8_0 needs a multiple of {BLOCK}, which {what} {length} is not: use --dtype float16",
        )
    arch = gguf.MODEL_ARCH.GPT2 if config.blocks == "gpt2" else gguf.MODEL_ARCH.QWEN3
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type("model")
    writer.add_name(name)
    writer.add_description(description)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == "float32" else f"MOSTLY_{KINDS[dtype]}"])
    add_shape(writer, config)
    add_tokenizer(writer, gguf, json.loads(checkpoint["tokenizer"]), config.vocab_size, checkpoint["eot_id"])
    names = gguf.get_tensor_name_map(arch, config.n_layer)
    for their, tensor in tensors.items():
        name = names.get_name(their, try_suffixes=(".weight", ".bias"))
        array = (tensor.T if TRANSPOSED.fullmatch(their) else tensor).contiguous().float().numpy()
        matrix = tensor.dim() == 2 and name not in ALWAYS_FLOAT32
        kind = gguf.GGMLQuantizationType[KINDS[dtype] if matrix else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_shape(writer: object, config: GPTConfig) -> None:
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_hidden)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.kv_heads)
    if config.blocks == "gpt2":
        writer.add_layer_norm_eps(NORM_EPS["gpt2"])
    else:
        writer.add_layer_norm_rms_eps(NORM_EPS["modern"])
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_freq_base(config.rope_base)


def add_tokenizer(writer: object, gguf: ModuleType, tokenizer: dict, vocab_size: int, eot_id: int) -> None:
    """Write the vocabulary, how text is split into words, and eot_id as the start and end of every story."""
    model, cut = tokenizer["model"], tokenizer["pre_tokenizer"]
    supported = model["type"] == "BPE" and tokenizer["normalizer"] is None and not model.get("ignore_merges")
    by_words = splits_as_gpt2(cut)
    by_characters = supported and cut is None and model["byte_fallback"] and not model["merges"]
    require(
        supported and (by_words or by_characters),
        "llama.cpp cannot split text as this tokenizer does: use one of kind bpe, gpt2 or char",
    )
    tokens = {number: token for token, number in model["vocab"].items()}
    tokens |= {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    special = {token["id"] for token in tokenizer["added_tokens"]}
    if by_words:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        writer.add_token_merges(merges)
    else:
        require(
            SPACE not in model["vocab"],
            f"llama.cpp would read {SPACE!r}, a character of these stories, as a space",
        )
        tokens = {number: token if token != " " else SPACE for number, token in tokens.items()}
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([0.0] * vocab_size)
        writer.add_add_space_prefix(False)
    types = []
    for number in range(vocab_size):
        if number not in tokens:  # a vocabulary larger than its tokenizer
            types.append(gguf.TokenType.UNUSED)
        elif number in special:
            types.append(gguf.TokenType.CONTROL)
        else:
            is_byte = by_characters and tokens[number].startswith("<0x")
            types.append(gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL)
    writer.add_token_list([tokens.get(number, f"<unused{number}>") for number in range(vocab_size)])
    writer.add_token_types(types)
    writer.add_bos_token_id(eot_id)
    writer.add_eos_token_id(eot_id)
    writer.add_pad_token_id(eot_id)
    writer.add_add_bos_token(True)
