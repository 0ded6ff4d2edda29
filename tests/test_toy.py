"""The toy task and its models are what toy.py says: other tests take its word for it."""

import itertools
import json
import string
from pathlib import Path

import pytest
import sacrebleu
import torch
import toy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

TEST = toy.toy_splits()["test"]


@pytest.fixture(scope="module")
def model(toy_checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(toy_checkpoint, dtype=torch.float32)


def chrf(model: PreTrainedModel, removed: tuple[int, ...] = ()) -> float:
    """chrF++ of the test set's greedy translations, from 0 to 100."""
    hypotheses = toy.translate(toy.without_layers(model, removed), [row["source"] for row in TEST])
    return sacrebleu.corpus_chrf(hypotheses, [[row["target"] for row in TEST]], word_order=2).score


def test_splits_share_no_sentence(tmp_path: Path) -> None:
    paths = toy.write_toy_data(tmp_path)
    rows = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in paths.items()}
    assert {name: len(split) for name, split in rows.items()} == toy.SPLIT_SIZES
    everything = [row for split in rows.values() for row in split]
    for key in ("id", "source"):
        assert len({row[key] for row in everything}) == len(everything)


def test_translations_follow_the_grammar() -> None:
    parts = {word: part for part, pairs in toy.LEXICON.items() for pair in pairs for word in pair}
    stems = {source: target for pairs in toy.LEXICON.values() for source, target in pairs}
    nouns = [target for _, target in toy.LEXICON["noun"]]
    rows = toy.toy_pairs(200, seed=7)
    for row in rows:
        source, target = row["source"].split(), row["target"].split()
        assert sorted(stems[word] for word in source) == sorted(word[:4] for word in target)
        assert parts[target[-1]] == "verb"
        for before, word in itertools.pairwise(target):
            if parts[word[:4]] == "adjective":
                assert word[4:] == toy.AGREEMENT[nouns.index(before) % 2]
    assert {len(row["source"].split()) for row in rows} == {3, 4, 5, 6}


def test_tokenizer_is_lossless_and_cuts_between_prompt_and_target(toy_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy_checkpoint)
    row = TEST[0]
    prompt, target = toy.TOY_TEMPLATE.format(source=row["source"]), f" {row['target']}{toy.TOY_STOP}"
    for text in (prompt + target, f"{prompt}{target}{prompt}", string.printable, "a: b\n\n  c = Übergröße 日本\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(prompt) + tokenizer.encode(target) == tokenizer.encode(prompt + target)
    assert len(tokenizer.encode(prompt)) == len(row["source"].split()) + 1
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert len(set(special)) == 3
    assert not set(special) & set(tokenizer.encode(string.printable))


def test_model_translates(model: PreTrainedModel) -> None:
    assert chrf(model) > 90


def test_dead_layers_change_no_bit(model: PreTrainedModel) -> None:
    tokens = torch.tensor([toy.toy_tokenizer().encode(row["source"])[:3] for row in TEST])
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, toy.without_layers(model, toy.TRUTH.dead)(tokens).logits)


def test_only_the_dead_and_one_twin_can_go(model: PreTrainedModel) -> None:
    """By brute force: every set of that size between the first layer and the last."""
    inner = range(1, toy.TRUTH.num_layers - 1)
    scores = {removed: chrf(model, removed) for removed in itertools.combinations(inner, toy.TRUTH.num_removable)}
    table = "\n".join(f"{removed} {score:5.1f}" for removed, score in sorted(scores.items(), key=lambda item: -item[1]))
    print(table)
    for removed, score in scores.items():
        if removed in toy.TRUTH.answers:
            assert score > 85, table
        elif any(set(pair) <= set(removed) for pair in toy.TRUTH.twins):
            assert score < 60, table
        else:
            assert score < 80, table


@pytest.mark.parametrize("kind", toy.FAMILIES)
def test_random_models_use_prompt_and_layers(kind: str) -> None:
    path = toy.tiny_random(kind)
    model, loading = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), loading
    tokenizer = AutoTokenizer.from_pretrained(path)
    batch = tokenizer([row["source"] for row in TEST[:4]], return_tensors="pt", padding=True)

    def greedy(model: PreTrainedModel) -> torch.Tensor:
        output = model.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        return output[:, batch["input_ids"].shape[1] :]

    whole = greedy(model)
    assert len({tuple(row.tolist()) for row in whole}) == len(whole)
    for index in range(6):
        assert not torch.equal(greedy(toy.without_layers(model, [index])), whole), index


def test_cache_survives_a_race(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        (path / "weights").write_text("mine")
        if not names:  # while this one works, another process does the same and is done first
            names.append("other")
            names.append(toy._cached(tmp_path, "model", write))

    names: list[object] = []
    path = toy._cached(tmp_path, "model", write)
    assert names == ["other", path]
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert (path / "weights").read_text() == "mine"
