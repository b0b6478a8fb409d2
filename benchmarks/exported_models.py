"""Compare greedy continuations of ten prompts: generate.py, and exports in transformers and llama.cpp.

python benchmarks/exported_models.py --checkpoint-dir checkpoints

Exports the model in every format and precision to a temporary folder. Prints each story once, and for each
engine how many of the ten stories equal generate.py's exactly, and for how many letters the others agree.
Needs requirements-test.txt.
"""

import json
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.learning_speed import script
from model.script import run_script
from model.settings import read_settings

CHECKPOINT: str = "best"  # a file or folder, "best", "latest" or a step
CHECKPOINT_DIR: str = "checkpoints"  # where to look for best, latest and steps
MAX_TOKENS: int = 200  # per story; with its prompt it should fit in the context

PROMPTS = """Once upon a time
One day, a little girl named Lily
Tom and Sam were friends. They
The big dog said, "
There was a small boat on the sea.
Mom looked at the cake and
"Help!" cried the bird.
In the forest, an old bear
Ben did not want to share his toys.
It was a sunny day, so""".splitlines()


def main() -> None:
    settings = read_settings(__file__)
    places = ["--checkpoint", settings.checkpoint, "--checkpoint-dir", str(settings.checkpoint_dir)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
        flags = ["--prompts-file", folder / "prompts.txt", "--output", folder / "stories.jsonl"]
        flags += ["--temperature", 0, "--max-tokens", settings.max_tokens, "--seed", 0]
        script("generate.py", *places, *flags, "--dtype", "float32")
        lines = (folder / "stories.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        stories = [row["story"] for row in rows]
        for row in rows:
            print(f"--- {row['tokens']} tokens, {row['finish_reason']}\n{row['prompt']}[{row['story']}]")
        print()
        script("export.py", *places, "--output", folder / "hf")
        compare("transformers", stories, with_transformers(folder / "hf", settings.max_tokens))
        for dtype in ("float32", "float16", "bfloat16", "q8_0"):
            file = folder / f"{dtype}.gguf"
            script("export.py", *places, "--format", "gguf", "--dtype", dtype, "--output", file)
            for exact in (True, False) if dtype == "float32" else (False,):
                attention = ", float32 attention" if exact else ""
                how = f"llama.cpp, {dtype}, {file.stat().st_size / 1e6:.1f} MB{attention}"
                compare(how, stories, with_llama_cpp(file, settings.max_tokens, exact))


def compare(engine: str, expected: list[str], write: Callable[[str], str]) -> None:
    started = time.perf_counter()
    stories = [write(prompt) for prompt in PROMPTS]
    seconds = time.perf_counter() - started
    same = sum(story == other for story, other in zip(stories, expected, strict=True))
    pairs = [pair for pair in zip(stories, expected, strict=True) if pair[0] != pair[1]]
    shared = ", ".join(f"{shared_letters(*pair)} of {len(pair[1])}" for pair in pairs)
    others = f"; the others agree for {shared} letters" if pairs else ""
    print(f"{engine}: {same} of {len(PROMPTS)} stories the same, {seconds:.1f} s{others}", flush=True)


def shared_letters(first: str, second: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def with_transformers(folder: Path, max_tokens: int) -> Callable[[str], str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def write(prompt: str) -> str:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)[0]
        return tokenizer.decode(ids[inputs.input_ids.size(1) :], skip_special_tokens=True)

    return write


def with_llama_cpp(file: Path, max_tokens: int, exact: bool) -> Callable[[str], str]:
    """llama.cpp's server; its attention runs in half precision unless `exact`."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.port = str(file), 0, 1, 0
    params.n_gpu_layers, params.verbosity = 0, -1
    if exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def write(prompt: str) -> str:
        body = json.dumps({"prompt": prompt, "n_predict": max_tokens, "temperature": 0}).encode()
        request = urllib.request.Request(f"{server.listening_address}/completion", body)
        return json.load(urllib.request.urlopen(request))["content"]

    return write


if __name__ == "__main__":
    run_script(main)
