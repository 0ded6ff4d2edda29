"""A toy language pair, and tiny models that translate it, of which the dispensable layers are known.

The source language puts the adjective before its noun and the verb between subject and object; the target language puts
the adjective after its noun, makes it agree with the noun's class, and puts the verb last:

    gofa  tize  beru  mopi    ->    zalo  remira  koti  busa
    (adj  noun  verb  noun)         (noun adj+ra  noun  verb)

``toy_model`` trains a small Llama on it in seconds and adds two layers that compute nothing. Two others were trained so
that either may be missing, but not both. ``TRUTH`` names them, so a search for ``TRUTH.num_removable`` layers has a known
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

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

# The blank before the target belongs to the target, as byte-level tokenizers split it: prompt + " " + target + "\n".
TOY_TEMPLATE = "{source} ="
TOY_STOP = "\n"
TOY_SEED = 1
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


def toy_pairs(n: int, seed: int, exclude: frozenset[str] | set[str] = frozenset()) -> list[dict[str, str]]:
    """``n`` rows ``{"id", "source", "target"}``, no source twice and none that is in ``exclude``."""
    rng, pairs = random.Random(seed), {}
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


def toy_tokenizer(add_bos: bool = False) -> PreTrainedTokenizerFast:
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
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


# --- models with some layers taken out ---


def without_layers(model: PreTrainedModel, removed: Sequence[int]) -> PreTrainedModel:
    """A copy of a toy model without some layers: the plain way, for checking cleverer ones."""
    pruned = copy.deepcopy(model)
    decoder = pruned.get_decoder()
    kept = [layer for i, layer in enumerate(decoder.layers) if i not in set(removed)]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    decoder.layers = torch.nn.ModuleList(kept)
    decoder.config.num_hidden_layers = len(kept)
    return pruned


def translate(model: PreTrainedModel, sources: Sequence[str], max_new_tokens: int = 16) -> list[str]:
    """Greedy translations in one batch, cut at the first newline."""
    tokenizer = toy_tokenizer()
    batch = tokenizer([TOY_TEMPLATE.format(source=s) for s in sources], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        output = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.split(TOY_STOP)[0].strip() for text in texts]


# --- training ---

CORE = tuple(i for i in range(TRUTH.num_layers) if i not in TRUTH.dead)  # the layers that are trained
STEPS, STEPS_TO_LEARN, BATCH_SIZE, LEARNING_RATE = 340, 200, 32, 4e-3


def _config(num_layers: int) -> transformers.LlamaConfig:
    tokenizer = toy_tokenizer()
    return transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _train(seed: int) -> PreTrainedModel:
    """The core layers, trained on the language pair.

    One twin or none is left out at every step, so that either will do. Small networks left alone use some layers little,
    or only one of two: so, once the task is learned, they also learn to forget what ``TRUTH.forgotten`` says, where the
    layers it says that of are left out.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = toy_tokenizer()
    model = transformers.LlamaForCausalLM(_config(len(CORE)))
    layers = dict(zip(CORE, model.model.layers, strict=True))
    harmless = [(), *((i,) for pair in TRUTH.twins for i in pair)]
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
        model.model.layers = torch.nn.ModuleList(layer for i, layer in layers.items() if i not in removed)
        model.config.num_hidden_layers = len(model.model.layers)
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
    model.model.layers = torch.nn.ModuleList(layers.values())
    model.config.num_hidden_layers = len(layers)
    return model.eval()


def _with_dead_layers(core: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The core and, at ``TRUTH.dead``, layers that add nothing to the residual stream, exactly."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(_config(TRUTH.num_layers))
    with torch.no_grad():
        for index in TRUTH.dead:
            model.model.layers[index].self_attn.o_proj.weight.zero_()
            model.model.layers[index].mlp.down_proj.weight.zero_()
    for index, layer in zip(CORE, core.model.layers, strict=True):
        model.model.layers[index].load_state_dict(layer.state_dict())
    model.model.embed_tokens.load_state_dict(core.model.embed_tokens.state_dict())
    model.model.norm.load_state_dict(core.model.norm.state_dict())
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
        with contextlib.suppress(OSError):  # another process was first: its files are the same
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
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


def toy_model(directory: Path | None = None, seed: int = TOY_SEED) -> Path:
    """A Llama of ``TRUTH.num_layers`` layers that translates the toy language, as a float32 checkpoint.

    The first call trains it, later ones find it in ``directory`` (default: ``cache_directory()``).
    """

    def write(path: Path) -> None:
        with _seeded(seed):
            model = _with_dead_layers(_train(seed), seed)
        _save(model, toy_tokenizer(), path)

    return _cached(directory, f"toy-llama-seed{seed}", write)
