"""The toy task and its models are what toy.py says: other tests take its word for it."""

import itertools
import json
from pathlib import Path

import pytest
import sacrebleu
import toy
import torch
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


def test_a_sentence_keeps_its_grammar() -> None:
    """Word by word against the lexicon: adjectives follow their noun and agree, the verb is last."""
    target_of = {source: target for pairs in toy.LEXICON.values() for source, target in pairs}
    part_of = {source: part for part, pairs in toy.LEXICON.items() for source, _ in pairs}
    nouns = [source for source, _ in toy.LEXICON["noun"]]
    seen = set()
    for row in toy.toy_pairs(50, seed=7):
        source = row["source"].split()
        seen.add(len(source))
        expected: list[str] = []
        for word, following in itertools.pairwise([*source, ""]):
            match part_of[word]:
                case "adjective":
                    agreement = toy.AGREEMENT[nouns.index(following) % 2]
                    expected += [target_of[following], target_of[word] + agreement]
                case "noun" if target_of[word] not in expected[-2:-1]:
                    expected.append(target_of[word])
        expected.append(next(target_of[word] for word in source if part_of[word] == "verb"))
        expected[:0] = [target_of[word] for word in source if part_of[word] == "adverb"]
        assert row["target"] == " ".join(expected)
    assert seen == {3, 4, 5, 6}
