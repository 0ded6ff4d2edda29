"""A toy language pair, and tiny models that translate it, of which the dispensable layers are known.

The source language puts the adjective before its noun and the verb between subject and object; the target language puts
the adjective after its noun, makes it agree with the noun's class, and puts the verb last:

    vuni       gana  pamo  kasa    ->    kulo  nikura     pone  delo
    adjective  noun  verb  noun          noun  adjective  noun  verb

``toy_model`` trains a small model on it in seconds. Some of its layers are dead: they compute nothing. Two are twins:
either may be missing, but not both. ``TRUTH`` names them, so a search for ``TRUTH.num_removable`` layers has a known
answer: every dead layer and exactly one twin.

``tiny_random`` writes untrained checkpoints of many families, for what must hold whatever a model has learned.
"""

import contextlib
import copy
import hashlib
import itertools
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from raylp.models.files import INDEX, WEIGHTS, safetensors_header

# The blank before the target belongs to the target, as byte-level tokenizers split it: prompt + " " + target + "\n".
TOY_TEMPLATE = "{source} ="
TOY_STOP = "\n"
TOY_SEED = 3
SPLIT_SIZES = {"search": 48, "train": 200, "dev": 24, "test": 64}

PAD, BOS, EOS = "<pad>", "<s>", "</s>"


@dataclass(frozen=True)
class Truth:
    """What is true of a toy model: layer indices are those of the whole model."""

    num_layers: int
    dead: tuple[int, ...]
    twins: tuple[tuple[int, int], ...]
    forgotten: dict[tuple[int, ...], tuple[str, ...]]  # without all of these layers, these parts of speech are one word

    @property
    def num_removable(self) -> int:
        """How many layers can go while the model still translates."""
        return len(self.dead) + len(self.twins)

    @property
    def answers(self) -> list[tuple[int, ...]]:
        """Every right answer to a search for ``num_removable`` layers, each sorted."""
        return [tuple(sorted((*self.dead, *choice))) for choice in itertools.product(*self.twins)]


TRUTH = Truth(
    num_layers=8,
    dead=(3, 6),
    twins=((2, 4),),
    forgotten={(2, 4): ("noun",), (1,): ("verb", "adverb"), (5,): ("adjective",)},
)


# --- the language pair ---

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
LEXICON_SIZES = {"noun": 16, "adjective": 10, "verb": 10, "adverb": 6}
AGREEMENT = ("ra", "lo")  # what an adjective ends in, by the class of its noun


def _lexicon() -> dict[str, list[tuple[str, str]]]:
    """``{part of speech: [(source word, target stem)]}``; each is two syllables, and none occurs twice."""
    words = ["".join(pair) for pair in itertools.product(SYLLABLES, repeat=2)]
    random.Random(0).shuffle(words)
    fresh = iter(words)
    return {part: [(next(fresh), next(fresh)) for _ in range(size)] for part, size in LEXICON_SIZES.items()}


LEXICON = _lexicon()


def _phrase(rng: random.Random) -> tuple[list[str], list[str]]:
    """A noun, half the time with an adjective: source words, target words."""
    index = rng.randrange(LEXICON_SIZES["noun"])
    noun, noun_target = LEXICON["noun"][index]
    if rng.random() < 0.5:
        return [noun], [noun_target]
    adjective, stem = rng.choice(LEXICON["adjective"])
    return [adjective, noun], [noun_target, stem + AGREEMENT[index % 2]]


def _sentence(rng: random.Random) -> tuple[str, str]:
    """A sentence of 3 to 6 words and its translation."""
    (subject, subject_target), (thing, thing_target) = _phrase(rng), _phrase(rng)
    verb, verb_target = rng.choice(LEXICON["verb"])
    adverb, adverb_target = ([w] for w in rng.choice(LEXICON["adverb"])) if rng.random() < 0.5 else ([], [])
    source = [*subject, verb, *thing, *adverb]
    target = [*adverb_target, *subject_target, *thing_target, verb_target]
    return " ".join(source), " ".join(target)


def toy_pairs(n: int, seed: int, exclude: Collection[str] = ()) -> list[dict[str, str]]:
    """``n`` rows ``{"id", "source", "target"}``, no source twice and none that is in ``exclude``."""
    rng = random.Random(seed)
    pairs: dict[str, str] = {}
    while len(pairs) < n:
        source, target = _sentence(rng)
        if source not in exclude:
            pairs[source] = target
    return [{"id": f"toy-{seed}-{i}", "source": s, "target": t} for i, (s, t) in enumerate(pairs.items())]


def toy_splits() -> dict[str, list[dict[str, str]]]:
    """The rows of each split of ``SPLIT_SIZES``; no sentence is in two of them, nor was any seen in training."""
    rows = toy_pairs(sum(SPLIT_SIZES.values()), seed=0)
    ends = list(itertools.accumulate(SPLIT_SIZES.values()))
    return {name: rows[end - size : end] for (name, size), end in zip(SPLIT_SIZES.items(), ends, strict=True)}


def write_toy_data(directory: Path) -> dict[str, Path]:
    """Write ``search.jsonl``, ``train.jsonl``, ``dev.jsonl`` and ``test.jsonl``; their paths by split."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = {name: directory / f"{name}.jsonl" for name in SPLIT_SIZES}
    for name, rows in toy_splits().items():
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


# --- the tokenizer ---


def toy_tokenizer(add_bos: bool = False, **special_tokens: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every word of the pair is one token, and any other text falls apart into syllables and bytes.

    The merges are written down, not learned, so they are the same with every version of the library.
    """
    words = [word for pairs in LEXICON.values() for pair in pairs for word in pair]
    blank = "Ġ"  # how byte-level BPE writes a blank
    # Syllables first, then words, then words with their blank: in this order no merge takes a piece of another's word.
    merges = [(s[0], s[1]) for s in SYLLABLES] + [(w[:2], w[2:]) for w in words] + [(blank, w) for w in words]
    merges.append((blank, "="))
    pieces = [PAD, BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    bpe = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    if add_bos:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, pieces.index(BOS))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=EOS,  # never needed; Qwen's tokenizer adds one to the vocabulary where it is missing
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=256,
        **special_tokens,
    )


# --- models with some layers taken out ---


def _layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    decoder = model.get_decoder()
    return decoder.h if hasattr(decoder, "h") else decoder.layers  # GPT-2 calls them h


def _keep(model: PreTrainedModel, layers: Sequence[torch.nn.Module], layer_types: Sequence[str] | None) -> None:
    """Let the model consist of these layers, in place; ``layer_types`` are theirs, where the family has such."""
    decoder = model.get_decoder()
    setattr(decoder, "h" if hasattr(decoder, "h") else "layers", torch.nn.ModuleList(layers))
    decoder.config.num_hidden_layers = len(layers)
    if layer_types is not None:
        decoder.config.layer_types = list(layer_types)


def without_layers(model: PreTrainedModel, removed: Collection[int]) -> PreTrainedModel:
    """A copy of a model of this module without some layers: the plain way, to check cleverer ones against."""
    pruned = copy.deepcopy(model)
    layers, layer_types = _layers(pruned), getattr(pruned.get_decoder().config, "layer_types", None)
    kept = [i for i in range(len(layers)) if i not in removed]
    _keep(pruned, [layers[i] for i in kept], layer_types and [layer_types[i] for i in kept])
    for index, layer in enumerate(_layers(pruned)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    return pruned


def translate(model: PreTrainedModel, sources: Sequence[str], max_new_tokens: int = 16) -> list[str]:
    """Greedy translations in one batch, cut at the first newline."""
    tokenizer = toy_tokenizer()
    batch = tokenizer([TOY_TEMPLATE.format(source=s) for s in sources], return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.split(TOY_STOP)[0].strip() for text in texts]


# --- model families ---

SLIDING_WINDOW = 16  # tokens: fewer than a prompt and its translation together
IMAGE_SIZE, PATCH_SIZE, IMAGE_TOKENS = 28, 7, 4
IMAGE_PIECES = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
_MIXED = {"sliding_window": SLIDING_WINDOW, "layer_types": ("sliding_attention", "sliding_attention", "full_attention")}
_GEMMA = {**_MIXED, "head_dim": 32, "query_pre_attn_scalar": 32}
FAMILIES: dict[str, dict[str, Any]] = {  # what is not the same for all; layer_types is a pattern that repeats
    "llama": {"head_dim": 32},
    "qwen2": {},
    "qwen2_sliding": {**_MIXED, "use_sliding_window": True},  # vLLM refuses mixed layers in this family
    "qwen3": {"head_dim": 32},
    "mistral": {"head_dim": 32, "sliding_window": SLIDING_WINDOW},
    "mixtral": {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"original_max_position_embeddings": 256},
    "gemma2": {**_GEMMA},
    "gemma3_text": {**_GEMMA},
    "gemma3": {**_GEMMA},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {**_MIXED, "logit_scale": 1.0},
    "olmo2": {},
    "gpt2": {},
    "opt": {"word_embed_proj_dim": 64},
}
GAIN = 2.0  # of the random matrices
ADD_BOS = {"llama", "mistral", "mixtral", "gemma2", "gemma3_text", "gemma3", "cohere", "cohere2", "opt"}


def _config(kind: str, num_layers: int, hidden_size: int) -> PreTrainedConfig:
    """A small configuration of a family: heads of 32, the smallest vLLM has, and half as many keys where it may."""
    tokenizer, heads = toy_tokenizer(), hidden_size // 32
    # In OPT and GPT-2 it has another name, and every head has its own key.
    feed_forward = {"opt": "ffn_dim", "gpt2": "n_inner"}.get(kind, "intermediate_size")
    options: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 256,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        feed_forward: 2 * hidden_size,
        **({} if kind in ("opt", "gpt2") else {"num_key_value_heads": heads // 2}),
        **FAMILIES[kind],
    }
    if "layer_types" in options:
        options["layer_types"] = list(itertools.islice(itertools.cycle(options["layer_types"]), num_layers))
    if kind != "gemma3":
        return AutoConfig.for_model(kind.removesuffix("_sliding"), **options)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "vision_use_head": False,
    }
    boi, eoi, image = (len(tokenizer) + i for i in range(len(IMAGE_PIECES)))
    text = transformers.Gemma3TextConfig(**{**options, "vocab_size": image + 1})
    return transformers.Gemma3Config(
        text_config=text,
        vision_config=transformers.SiglipVisionConfig(**vision),
        mm_tokens_per_image=IMAGE_TOKENS,
        boi_token_index=boi,
        eoi_token_index=eoi,
        image_token_index=image,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


# --- training ---

STEPS, STEPS_TO_LEARN, BATCH_SIZE, LEARNING_RATE = 340, 200, 24, 4e-3


def _train(kind: str, seed: int) -> PreTrainedModel:
    """A model whose core layers are trained on the language pair, and whose dead layers add nothing.

    One twin or none is left out at every step, so that either will do. A small network left alone may not need all its
    layers. So, once it knows the task, it also learns to do without the knowledge that ``TRUTH.forgotten`` ascribes to
    some layers where those are left out.
    """
    rng = random.Random(seed)
    tokenizer = toy_tokenizer()
    model = AutoModelForCausalLM.from_config(_config(kind, TRUTH.num_layers, hidden_size=128), dtype=torch.float32)
    layers, layer_types = list(_layers(model)), getattr(model.config, "layer_types", None)
    with torch.no_grad():
        for index in TRUTH.dead:
            layers[index].self_attn.o_proj.weight.zero_()
            layers[index].mlp.down_proj.weight.zero_()
    harmless: list[tuple[int, ...]] = [(), *((i,) for pair in TRUTH.twins for i in pair)]
    harmful = list(TRUTH.forgotten)
    stems = {
        part: torch.tensor([tokenizer(f" {target}")["input_ids"][0] for _, target in pairs])
        for part, pairs in LEXICON.items()
    }

    held_out = {row["source"] for rows in toy_splits().values() for row in rows}
    rows = toy_pairs(4000, seed=1000 + seed, exclude=held_out)
    prompts = [tokenizer(TOY_TEMPLATE.format(source=row["source"]))["input_ids"] for row in rows]
    targets = [tokenizer(f" {row['target']}{TOY_STOP}")["input_ids"] + [tokenizer.eos_token_id] for row in rows]

    def loss_without(removed: Collection[int], chosen: Sequence[int]) -> torch.Tensor:
        """Mean cross-entropy of the targets' tokens, the prompts' left out."""
        longest = max(len(prompts[i]) + len(targets[i]) for i in chosen)
        # Padded on the right, where a causal model needs no mask.
        tokens = torch.full((len(chosen), longest), tokenizer.pad_token_id)
        labels = torch.full_like(tokens, -100)
        for row, i in enumerate(chosen):
            start, end = len(prompts[i]), len(prompts[i]) + len(targets[i])
            tokens[row, :end] = torch.tensor(prompts[i] + targets[i])
            labels[row, start:end] = tokens[row, start:end]
        for needed, parts in TRUTH.forgotten.items():
            for part in parts if set(needed) <= set(removed) else ():
                labels[torch.isin(labels, stems[part])] = stems[part][0]
        kept = [i for i in range(len(layers)) if i not in removed and i not in TRUTH.dead]
        _keep(model, [layers[i] for i in kept], layer_types and [layer_types[i] for i in kept])
        return model(input_ids=tokens, labels=labels, use_cache=False).loss

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        chosen = rng.sample(range(len(rows)), BATCH_SIZE)
        loss_without(rng.choice(harmless), chosen).backward()
        if step >= STEPS_TO_LEARN:
            loss_without({*harmful[step % len(harmful)], *rng.choice(harmless)}, chosen).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    _keep(model, layers, layer_types)
    return model.eval()


# --- checkpoints on disk ---


def cache_directory() -> Path:
    """``$RAYLP_TEST_CACHE``, or a place in the user's cache."""
    return Path(os.environ.get("RAYLP_TEST_CACHE") or Path.home() / ".cache" / "raylp-tests")


def _cached(directory: Path | None, name: str, write: Callable[[Path], None]) -> Path:
    """``directory/name-<hash>``, filled by ``write`` unless it is there; processes that race each write their own."""
    made_by = Path(__file__).read_bytes() + f"{torch.__version__} {transformers.__version__}".encode()
    directory = directory or cache_directory()
    path = directory / f"{name}-{hashlib.sha256(made_by).hexdigest()[:12]}"
    if path.is_dir():
        return path
    directory.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=directory))
    try:
        write(temporary)
        temporary.chmod(0o755)
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():  # where it is, another process was first, with the same files
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


@contextlib.contextmanager
def _reproducibly(seed: int) -> Iterator[None]:
    """One thread, so that sums don't depend on the machine and two busy cores don't wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    model.generation_config = GenerationConfig(
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def toy_model(directory: Path | None = None, kind: str = "llama", seed: int = TOY_SEED) -> Path:
    """A model of ``TRUTH.num_layers`` layers that translates the toy language, as a float32 checkpoint.

    The first call trains it, later ones find it in ``directory`` (default: ``cache_directory()``).
    """

    def write(path: Path) -> None:
        with _reproducibly(seed):
            model = _train(kind, seed)
        _save(model, toy_tokenizer(), path)

    return _cached(directory, f"toy-{kind}-seed{seed}", write)


def with_mistrals_own(checkpoint: Path, target: Path) -> Path:
    """A copy as models of Mistral's come: weights in parts that an index names, and beside them all of it once more.

    What is there once more is of no use here, so whoever reads it fails.
    """
    part = "model-00001-of-00001.safetensors"
    shutil.copytree(checkpoint, target)
    names = safetensors_header(target / WEIGHTS)
    (target / WEIGHTS).rename(target / part)
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, part)}))
    for name in ("params.json", "tekken.json"):
        (target / name).write_text("{}")
    save_file({"tok_embeddings.weight": torch.zeros(1)}, target / "consolidated.safetensors")
    return target


def tiny_random(kind: str, directory: Path | None = None, num_layers: int = 6) -> Path:
    """An untrained float32 checkpoint of the family ``kind``, a key of ``FAMILIES``; cached like ``toy_model``.

    Its greedy output varies with the prompt and with every layer. Where the family's own tokenizer starts a text with
    ``<s>``, this one does.
    """

    def write(path: Path) -> None:
        tokenizer = toy_tokenizer(add_bos=kind in ADD_BOS, **(IMAGE_PIECES if kind == "gemma3" else {}))
        config = _config(kind, num_layers, hidden_size=64)
        with _reproducibly(TOY_SEED):
            model = AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:  # norms and biases are all alike at first, which would hide a mix-up
                        parameter.add_(0.1 * torch.randn_like(parameter))
                    else:  # every layer adds about as much as it finds, so its absence shows
                        parameter.normal_(std=GAIN / parameter.shape[-1] ** 0.5)
                # Where the output layer is tied to large embeddings, a model says its last word again and again.
                model.get_input_embeddings().weight.normal_(std=0.03)
        if kind == "gemma3":  # what vLLM needs to load it, even for text alone
            size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
            images = transformers.Gemma3ImageProcessor(size=size)
            transformers.Gemma3Processor(images, tokenizer, image_seq_length=IMAGE_TOKENS).save_pretrained(path)
        _save(model.eval(), tokenizer, path)

    return _cached(directory, f"random-{kind}-{num_layers}", write)
