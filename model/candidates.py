"""Models that `--checkpoint` accepts: a checkpoint of this project, or any causal language model in transformers.

Both become a Candidate, so that one protocol scores them on the same stories and bytes.
"""

import functools
import os
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from model.checkpoint import find_checkpoint, load_model, run_files
from model.decoder import Decoder, choose_weights
from model.errors import UserError, first_line, needs, require, warn
from model.files import sha256_file, shown
from model.generation import generate_all
from model.hub import why_offline
from model.metrics import read_history
from model.sampling import Sampling
from model.story_quality import Story
from model.tokenizer import readable, require_room, text_tokenizer

# Longest generated story, in tokens; generate.py's default
MAX_TOKENS = 400
WRITTEN_AT_ONCE = 32
# Stories used to check an external tokenizer
CHECKED = 256


class Candidate:
    """A model in evaluation mode on its device, its tokenizer, and facts to report.

    start_id is the token before a story, end_id the one after it. `tokenizer` encodes special-token markers in a
    text as text.
    """

    name: str
    stops_at_context = False  # whether a story ends where its context does
    whole_logits = False  # whether `states` computes the logits of all positions
    written_in = "float32"  # the weights with which it writes stories
    network: nn.Module
    tokenizer: Tokenizer
    start_id: int
    end_id: int
    block_size: int
    vocab_size: int
    facts: dict  # for the table and the .json file
    settings: dict  # for the report
    curve: list[dict]  # evaluations during training, rows of metrics.jsonl

    def states(self, idx: Tensor) -> Tensor:
        """Token ids (B, T) -> inputs of `head`, (B, T, ...)."""
        raise NotImplementedError

    def head(self, states: Tensor) -> Tensor:
        """States (N, ...) -> logits (N, V). Separate from `states`, so that only scored positions pay for it."""
        raise NotImplementedError

    def continue_ids(self, prompts: list[list[int]], seeds: list[int]) -> list[tuple[list[int], bool]]:
        """The tokens sampled after each prompt, without the end token, and whether it was reached."""
        raise NotImplementedError

    def adapt_to(self, stories: list[str]) -> None:
        """Determine from real stories what the model leaves open. Raises UserError if its tokenizer loses text."""
        encoded = self.tokenizer.encode_batch_fast(stories[:CHECKED], add_special_tokens=False)
        decoded = self.tokenizer.decode_batch([e.ids for e in encoded], skip_special_tokens=False)
        # some tokenizers put a space before each story
        changed = sum(a.lstrip(" ") != b.lstrip(" ") for a, b in zip(stories, decoded, strict=False))
        require(
            2 * changed <= len(decoded),
            f"the tokenizer of {self.name} does not reproduce stories: bits per byte would be wrong",
        )
        if changed:
            altered = f"{changed} of {len(decoded)} stories"
            warn(f"the tokenizer of {self.name} alters {altered}, so its bits per byte are not exact")

    def write(self, prompts: list[str], seed: int) -> list[Story]:
        """Generate a story for each prompt, the k-th with seed + k (a transformers model seeds a batch as a whole)."""
        encoded = self.tokenizer.encode_batch_fast(prompts, add_special_tokens=False)
        ids = [[self.start_id, *encoding.ids] for encoding in encoded]
        seeds = [seed + k for k in range(len(prompts))]
        stories = []
        starts = range(0, len(ids), WRITTEN_AT_ONCE)
        for first in tqdm(starts, desc="writing stories", disable=None, delay=1, leave=False):
            part = slice(first, first + WRITTEN_AT_ONCE)
            written = self.continue_ids(ids[part], seeds[part])
            for before, (after, ended) in zip(ids[part], written, strict=True):
                # decode together: some tokenizers would lose a space between prompt and story
                text = self.tokenizer.decode(before[1:] + after, skip_special_tokens=False)
                stories.append(Story(text, ended))
        return stories


class OwnModel(Candidate):
    """A checkpoint of this project."""

    def __init__(self, path: Path, device: torch.device):
        self.name = readable(shown(path))
        self.network, self.tokenizer, checkpoint = load_model(path, device)
        config = self.network.config
        self.start_id = self.end_id = checkpoint["eot_id"]
        self.block_size, self.vocab_size = config.block_size, config.vocab_size
        self.facts = {
            "checkpoint": self.name,
            "step": checkpoint["step"],
            "parameters": self.network.count_parameters(),
            "sha256": sha256_file(path),
            "trained_on": checkpoint["data"],
        }
        self.settings = {"step": checkpoint["step"], **checkpoint["config"], **checkpoint["settings"]}
        rows = read_history(path, checkpoint)
        self.curve = [{key: row.get(key) for key in ("step", "tokens", "bits_per_byte")} for row in rows]

    def states(self, idx: Tensor) -> Tensor:
        return self.network.hidden(idx)

    def head(self, states: Tensor) -> Tensor:
        return F.linear(states, self.network.head_weight)

    @functools.cached_property
    def decoder(self) -> Decoder:
        """As in generate.py, so that its stories are the ones that are judged."""
        weights = choose_weights(self.network.head_weight.device, "auto")
        return Decoder(self.network, weights, graphs=True)

    @property
    def written_in(self) -> str:
        return self.decoder.weights

    def continue_ids(self, prompts: list[list[int]], seeds: list[int]) -> list[tuple[list[int], bool]]:
        written = generate_all(self.decoder, prompts, MAX_TOKENS, self.end_id, Sampling(), seeds)
        return [(ids, len(ids) < MAX_TOKENS) for ids in written]


class TransformersModel(Candidate):
    """A model that transformers loads from a folder or the Hugging Face hub."""

    stops_at_context = True
    whole_logits = True

    def __init__(self, name: str, device: torch.device):
        self.name, self.curve = readable(name), []
        network, tokenizer = load_transformers(name)
        self.network = network.to(device).eval()
        require(
            hasattr(tokenizer, "backend_tokenizer"),
            f"the tokenizer of {name} has no fast version (tokenizer.json), which scoring needs",
        )
        # without its files, transformers may make an empty one
        require(len(tokenizer) > 2, f"{name} has no tokenizer: copy its files (tokenizer.json) there")
        self.tokenizer = text_tokenizer(tokenizer.backend_tokenizer.to_str())
        special = [t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None]
        require(special, f"the tokenizer of {name} has no end-of-text token, which scoring needs")
        self.start_id, self.end_id = special[0], special[-1]
        config = network.config
        # MPT's name for it is the second. Models without position embeddings have no limit; this one bounds memory.
        limits = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
        self.block_size = next(filter(None, limits), 2_048)
        self.vocab_size = network.get_input_embeddings().num_embeddings
        require_room(self.vocab_size, self.tokenizer, name)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        self.facts = {"checkpoint": self.name, "step": None, "parameters": parameters}
        files = sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []
        self.facts["sha256"] = {file.name: sha256_file(file) for file in files}
        self.facts["commit"] = getattr(config, "_commit_hash", None)
        plain = (int, float, str, bool)
        self.settings = {k: v for k, v in config.to_diff_dict().items() if isinstance(v, plain)}

    def states(self, idx: Tensor) -> Tensor:
        return self.network(input_ids=idx, use_cache=False).logits

    def head(self, states: Tensor) -> Tensor:
        return states

    @torch.no_grad()
    def adapt_to(self, stories: list[str]) -> None:
        """Choose the end token, too.

        Some models (such as llama2.c's) end a story with the token that starts the next, not with the tokenizer's
        end token. This picks whichever the model itself expects after real stories.
        """
        super().adapt_to(stories)
        few = stories[: CHECKED // 8]
        ends = torch.tensor([self.end_id, self.start_id])
        total = torch.zeros(2)
        for encoding in self.tokenizer.encode_batch_fast(few, add_special_tokens=False):
            ids = torch.tensor([[self.start_id, *encoding.ids][-self.block_size :]])
            logits = self.states(ids.to(self.network.device))[0, -1].float()
            total += logits.log_softmax(-1).cpu()[ends]
        self.end_id = int(ends[total.argmax()])

    def continue_ids(self, prompts: list[list[int]], seeds: list[int]) -> list[tuple[list[int], bool]]:
        device = self.network.device
        prompts = [prompt[-(self.block_size - 1) :] for prompt in prompts]
        width = max(map(len, prompts))
        idx = torch.tensor([[self.end_id] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        options = {
            "max_new_tokens": min(MAX_TOKENS, self.block_size - width),
            **Sampling().for_transformers(),
        }
        options |= {"eos_token_id": self.end_id, "pad_token_id": self.end_id}
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seeds[0])
            written = self.network.generate(idx, attention_mask=mask, **options)
        stories = []
        for ids in written[:, width:].tolist():
            ended = self.end_id in ids
            stories.append((ids[: ids.index(self.end_id)] if ended else ids, ended))
        return stories


def import_transformers(name: str) -> tuple[ModuleType, str]:
    """The transformers package, and why the hub is unreachable if that matters; "" if not."""
    offline = "" if Path(name).is_dir() else why_offline()  # transformers reads whether it is to stay so
    return needs("transformers", f"{name}, a Hugging Face model,"), offline


def load_transformers(name: str) -> tuple[nn.Module, object]:
    """Load model and tokenizer from a folder or hub name. Raises UserError if they do not load."""
    transformers, offline = import_transformers(name)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    where = "" if Path(name).is_dir() else "there is no such checkpoint here; as a Hugging Face model, "
    try:
        network, loading = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # each kind of damage raises its own exception
        reason = offline or first_line(error)
        raise UserError(f"{where}{name} does not load: {reason}") from None
    # transformers initialises missing weights at random
    lacking = sorted(loading["missing_keys"])
    require(not lacking, f"{name} lacks {len(lacking)} of its weights, including {', '.join(lacking[:2])}")
    return network, tokenizer


def find_candidate(folder: Path, name: str | None, prefer: str = "latest") -> Path | str:
    """The file of a checkpoint, or the name of a Hugging Face model. Raises UserError if it is neither."""
    if name is not None and (path := Path(os.path.expanduser(name))).joinpath("config.json").is_file():
        return str(path)
    try:
        return find_checkpoint(folder, name, prefer)
    except UserError as error:
        if not name or name.isdigit() or name in ("best", "latest") or name.endswith(".pt"):
            raise
        if name.count("/") == 1 and not Path(name).parent.is_dir():
            return name  # owner/name: perhaps on the hub
        raise UserError(f"{error}; a model on the Hugging Face hub is named owner/name") from None


def files_of(found: Path | str) -> list[Path]:
    """The files of a candidate: a checkpoint and its run's, or what is in a Hugging Face folder."""
    return [found, *run_files(found.parent)] if isinstance(found, Path) else list(Path(found).glob("*"))


def load_candidate(found: Path | str, device: torch.device) -> Candidate:
    candidate = OwnModel(found, device) if isinstance(found, Path) else TransformersModel(found, device)
    require(
        candidate.block_size >= 2,
        f"{candidate.name} has a context of {candidate.block_size} token: scoring needs at least 2",
    )
    return candidate
