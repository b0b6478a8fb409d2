"""Export a trained model for transformers and vLLM, or for llama.cpp, ollama and LM Studio.

python export.py --output my_model                               a folder that transformers loads
python export.py --format gguf --output my_model.gguf            a file that llama.cpp loads
python export.py --format gguf --dtype q8_0 --checkpoint latest  the latest instead of the best, 8 bits per weight

`python train.py --init-from my_model` imports such a folder.
"""

import json
import os
import re
import shlex
from pathlib import Path

from model.script import run_script  # before torch: see there

# isort: split
import torch
from tokenizers import processors
from torch import Tensor

from model.checkpoint import find_checkpoint, load_model
from model.config import GPTConfig, Recipe
from model.errors import needs, require
from model.files import atomic_folder, atomic_write, nearest_existing, shown, size_text
from model.huggingface import to_config_json, to_huggingface
from model.llama_cpp import write_gguf
from model.metrics import read_history
from model.sampling import Sampling
from model.settings import REPO, read_settings
from model.tokenizer import END_OF_TEXT, readable, text_tokenizer

CHECKPOINT: str | None = None  # a file or folder, "best", "latest" or a step; None: best, else latest
CHECKPOINT_DIR: str = "checkpoints"  # where to look for best, latest and steps
FORMAT: str = "hf"  # hf (a folder for transformers) or gguf (a file for llama.cpp)
OUTPUT: str | None = None  # folder or file to write; None: in exported/, named after the model
DTYPE: str = "float32"  # of the weights (in gguf: of matrices): float32, float16, bfloat16; gguf also q8_0
OVERWRITE: bool = False  # replace an earlier export

# Files in a folder for transformers
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
)


def main() -> None:
    settings = read_settings(
        __file__,
        choices={"format": ("hf", "gguf"), "dtype": ("float32", "float16", "bfloat16", "q8_0")},
        aliases={"model": "checkpoint", "out": "output", "out-dir": "checkpoint-dir"},
    )
    gguf, dtype = settings.format == "gguf", settings.dtype
    require(gguf or dtype != "q8_0", "--dtype q8_0 is for --format gguf")
    named_gguf = (settings.output or "").endswith(".gguf")
    require(gguf or not named_gguf, f"--output {settings.output}: add --format gguf, or name a folder")
    path = find_checkpoint(settings.checkpoint_dir, settings.checkpoint, prefer="best")
    model, _, checkpoint = load_model(path)
    name, origin = name_model(checkpoint["settings"])
    default = REPO / "exported" / (f"{name}.gguf" if gguf else name)
    output = Path(os.path.expanduser(settings.output)) if settings.output else default
    check_output(output, gguf, settings.overwrite)

    facts = list_facts(path, checkpoint, model.config, model.count_parameters())
    tensors = to_huggingface(model.state_dict(), model.config)
    if gguf:
        with atomic_write(output) as temporary:
            about = "; ".join(f"{key} {value}" for key, value in facts.items())
            write_gguf(temporary, tensors, model.config, checkpoint, dtype, name, about)
    else:
        files = make_files(tensors, model.config, checkpoint, dtype, model_card(name, origin, facts, dtype))
        with atomic_folder(output) as temporary:
            for file, content in files.items():
                (temporary / file).write_bytes(content)
    size = sum(file.stat().st_size for file in ([output] if gguf else output.iterdir()))
    print(f"{shown(path)}, step {checkpoint['step']:,} -> {shown(output)}, {size_text(size)}, {dtype}")
    where = shlex.quote(shown(output))
    command = f"llama-completion -m {where} -no-cnv -p 'Once upon a time'"
    print(f"try: {command}" if gguf else f"how to use it: {where}/README.md")


def check_output(output: Path, gguf: bool, overwrite: bool) -> None:
    """Refuse to overwrite anything except, with --overwrite, an earlier export."""
    if gguf:
        require(output.suffix == ".gguf", f"--output {output}: the name of a GGUF file ends in .gguf")
        require(not output.is_dir(), f"{shown(output)} is a folder: --format gguf writes a file")
        require(overwrite or not output.exists(), f"{shown(output)} exists: --overwrite replaces it")
        return
    folder = nearest_existing(output)
    require(folder.is_dir(), f"{shown(folder)} is a file: --format hf writes a folder")
    holds_us = Path.cwd().is_relative_to(output.resolve())
    require(
        not holds_us, f"--output {output} would replace the current folder: name a folder in it, or elsewhere"
    )
    present = {file.name for file in output.iterdir()} if output.exists() else set()
    require(overwrite or not present, f"{shown(output)} is not empty: --overwrite replaces an earlier export")
    foreign = sorted(present - set(FILES))
    require(
        not foreign,
        f"{shown(output)} is not only an export, it holds {', '.join(foreign[:3])}: choose another folder",
    )
    export = not present or {"config.json", "model.safetensors"} <= present
    require(export, f"{shown(output)} is not an export, it holds no model: choose another folder")


def name_model(settings: dict) -> tuple[str, str | None]:
    """The model's name, and that of the model that it was fine-tuned from, without the folders of a path."""
    if not settings.get("init_from"):
        return settings["preset"], None
    origin = readable(settings["init_from"])
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(?<!\.pt)", origin):  # not the name of a model on the hub
        origin = Path(origin).name
    return f"{Path(origin).name.removesuffix('.pt')}-finetuned", origin


def list_facts(path: Path, checkpoint: dict, config: GPTConfig, parameters: int) -> dict[str, str]:
    """The facts for the model card, in its order."""
    settings, step = checkpoint["settings"], checkpoint["step"]
    tokens = step * Recipe(batch_tokens=settings["batch_tokens"]).tokens_per_step(config.block_size)
    tuned = settings.get("init_from")  # whose shape is not the preset's
    facts = {} if tuned else {"preset": settings["preset"]}
    facts |= {
        "architecture": "GPT-2" if config.blocks == "gpt2" else "Qwen3",
        "shape": f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}",
        "parameters": f"{parameters:,}",
        "context": f"{config.block_size:,} tokens, prompt and story together",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "fine-tuned on" if tuned else "trained on": f"{tokens:,} tokens in {step:,} steps",
    }
    for row in read_history(path, checkpoint):
        if row["step"] == step:
            facts["validation bits per byte"] = f"{row['bits_per_byte']:.4f}"
            facts["validation loss"] = f"{row['validation_loss']:.4f} nats per token"
    return facts | {f"SHA-256 of the {what}": digest for what, digest in checkpoint["data"].items()}


def make_files(
    tensors: dict[str, Tensor], config: GPTConfig, checkpoint: dict, dtype: str, card: str
) -> dict[str, bytes]:
    """The files, by name, of a folder that transformers' from_pretrained loads."""
    save = needs("safetensors.torch", "--format hf").save
    eot_id = checkpoint["eot_id"]
    tokenizer = text_tokenizer(checkpoint["tokenizer"])
    # In training every story followed an end-of-text token, so the tokenizer prepends one to every text.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B:1",
        special_tokens=[(END_OF_TEXT, eot_id)],
    )
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": END_OF_TEXT for role in ("bos", "eos", "pad")},
        "model_max_length": config.block_size,
        "padding_side": "left",  # what is continued comes last
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # <|endoftext|> spelled out in a story stays text
    }
    generation = {
        **{f"{role}_token_id": eot_id for role in ("bos", "eos", "pad")},
        "max_length": config.block_size,
        **Sampling().for_transformers(),
    }
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    values = {
        "config.json": {**to_config_json(config, eot_id), "dtype": dtype},
        "generation_config.json": generation,
        "tokenizer_config.json": tokenizer_config,
    }
    texts = {name: json.dumps(value, indent=2) + "\n" for name, value in values.items()}
    texts |= {"tokenizer.json": tokenizer.to_str(pretty=True), "README.md": card}
    files = {name: text.encode() for name, text in texts.items()}
    return {"model.safetensors": save(tensors, metadata={"format": "pt"}), **files}


MEASURED = """\
Bits per byte (loss / ln 2 / bytes of text) can be compared between tokenizers, loss per token cannot. Both
were measured during training, on windows of validation stories, none of which is also a training story{}.

"""
TUNED = " (of the\nfine-tuning; the original model may have seen them)"


def model_card(name: str, origin: str | None, facts: dict[str, str], dtype: str) -> str:
    how = f"fine-tuned from {origin}" if origin else "trained from scratch"
    measured = MEASURED.format(TUNED if origin else "") if "validation loss" in facts else ""
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A small language model that writes stories, {how}.

| | |
| --- | --- |
{table}

{measured}## How to use it

Prompt it with the start of a story, or with nothing. The tokenizer prepends `{END_OF_TEXT}`, which marks the
start of a story; the model ends a story with the same token.

```python
from transformers import pipeline

write = pipeline("text-generation", "path/to/this/folder")
print(write("Once upon a time")[0]["generated_text"])
```

```bash
vllm serve path/to/this/folder --dtype {dtype}
```
"""


if __name__ == "__main__":
    run_script(main)
