"""Parallel text in, and every way it can be wrong."""

import json
from pathlib import Path

import pytest
from conftest import toy_recipe
from hypothesis import given
from hypothesis import strategies as st

from raylp.data.corpus import Pair, read_pairs
from raylp.data.prompt import Prompt, choose_examples
from raylp.data.splits import check_disjoint, cut, sentence_hash
from raylp.errors import UserError
from raylp.models.load import load_tokenizer
from raylp.pipeline import read_splits
from raylp.recipe import parse_recipe

ROOT = Path(__file__).parent.parent


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_three_forms_read_the_same(tmp_path: Path) -> None:
    rows = [("Hello.", "Hallo."), ("Thank you.", "Danke.")]
    jsonl = write(tmp_path / "a.jsonl", *(json.dumps({"source": s, "target": t}) for s, t in rows))
    tsv = write(tmp_path / "a.tsv", *(f"{s}\t{t}" for s, t in rows))
    sides = [str(write(tmp_path / "a.en", *(s for s, _ in rows))), str(write(tmp_path / "a.de", *(t for _, t in rows)))]
    read = [[(p.source, p.target) for p in read_pairs(path, "en-de")] for path in (jsonl, tsv, sides)]
    assert read == [rows, rows, rows]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"source": "x", "target": "y"}\n{"source": "x"}\n', "line 2: no text under 'target'"),
        ("a.jsonl", b'{"src": "x", "tgt": "y"}\n', "it has: src, tgt"),
        ("a.jsonl", b'{"source": "x", "target": " "}\n', "line 1: no target"),
        ("a.jsonl", b'{"source": "x"\n', "line 1: not JSON"),
        ("a.jsonl", b"[1]\n", "line 1: no text"),
        ("a.jsonl", '{"source": "é", "target": "y"}'.encode("latin-1"), "line 1: not UTF-8"),
        ("a.jsonl", b'{"source": "a\\nb", "target": "y"}\n', "line break inside the source"),
        ("a.jsonl", b'{"id": "1", "source": "a", "target": "y"}\n{"id": "1", "source": "b", "target": "y"}\n', "twice"),
        ("a.tsv", b"one column\n", "1 columns"),
        ("a.csv", b"x,y\n", "use .jsonl"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_pairs(path, "en-de")
    assert said in str(error.value) and str(path) in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not there"):
        read_pairs(tmp_path / "a.jsonl", "en-de")


def test_two_files_that_differ_in_length(tmp_path: Path) -> None:
    paths = [str(write(tmp_path / "a", "x", "y")), str(write(tmp_path / "b", "x"))]
    with pytest.raises(UserError, match="differ in lines: 2 and 1"):
        read_pairs(paths, "en-de")


def test_splits_may_not_overlap() -> None:
    here, there = Pair("1", "Good morning!", "Guten Morgen!", "en-de"), Pair("7", "good  morning", "Moin", "en-de")
    with pytest.raises(UserError, match=r"is in train \(id 1\) and in test \(id 7\)"):
        check_disjoint({"train": [here], "test": [there]})
    check_disjoint({"train": [here], "test": [Pair("7", "good morning", "Dobré ráno", "en-cs")]})


@given(st.text())
def test_sentence_hash_ignores_case_and_blanks(text: str) -> None:
    assert sentence_hash(f"  {text} ") == sentence_hash(text)


@given(st.lists(st.integers(0, 30), min_size=20, max_size=60), st.integers(0, 5))
def test_cut_keeps_documents_whole_and_sentences_apart(documents: list[int], size: int) -> None:
    examples = [Pair(f"{d}:{i}", f"sentence {i % 15}", "satz", "en-de") for i, d in enumerate(documents)]
    try:
        dealt = cut(examples, {"test": size, "dev": size, "search": size})
    except UserError:
        return
    check_disjoint(dealt)
    assert len(dealt["test"]) == size
    places = {}
    for split, part in dealt.items():
        for example in part:
            assert places.setdefault(example.id.split(":")[0], split) == split


def test_prompt_and_target_meet_where_the_tokenizer_would_cut(toy_checkpoint: Path) -> None:
    tokenizer = load_tokenizer(toy_checkpoint)
    shown = [Pair("1", "gofa tize", "zalo remi", "xx-yy"), Pair("2", "tize", "remi", "xx-yy")]
    prompt = Prompt(template="{source} =", examples=choose_examples(shown, 1))
    whole = tokenizer("gofa tize = zalo remi\ntize = remi\n").input_ids
    assert prompt.prompt_tokens(tokenizer, "tize", "xx-yy") + prompt.target_tokens(tokenizer, "remi") == whole


def test_an_answer_ends_as_the_chat_template_ends_it(toy_checkpoint: Path) -> None:
    tokenizer = load_tokenizer(toy_checkpoint)
    words = tokenizer("remi", add_special_tokens=False).input_ids
    turn = "{% for m in messages %}[{{ m.role }}]{{ m.content }}END{% endfor %}"
    tokenizer.chat_template = turn.replace("END", "\n")
    assert Prompt(chat=True).target_tokens(tokenizer, "remi") == [*words, tokenizer.eos_token_id]
    tokenizer = load_tokenizer(toy_checkpoint)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    tokenizer.chat_template = turn.replace("END", "<end_of_turn>\n")
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert end != tokenizer.eos_token_id
    assert Prompt(chat=True).target_tokens(tokenizer, "remi") == [*words, end]


def test_a_model_that_may_think_is_told_to_answer(toy_checkpoint: Path) -> None:
    tokenizer = load_tokenizer(toy_checkpoint)
    turns = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.chat_template = turns + "{% if enable_thinking is not defined or enable_thinking %} remi{% endif %}"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "gofa"}], tokenize=False) == "gofa remi"
    prompt = Prompt(chat=True, template="{source}").prompt_tokens(tokenizer, "gofa", "xx-yy")
    assert prompt == tokenizer("gofa").input_ids


def test_prompt_errors(toy_checkpoint: Path) -> None:
    with pytest.raises(UserError, match="is not a field"):
        Prompt(template="{sauce}").ask("x", "en-de")
    with pytest.raises(UserError, match="no chat template"):
        Prompt(chat=True).prompt_tokens(load_tokenizer(toy_checkpoint), "x", "en-de")
    with pytest.raises(UserError, match="source and target"):
        Prompt().ask("x", "german")


def test_samples_of_the_demo() -> None:
    for pair, sizes in {"en-de": (48, 319, 20, 64), "cs-de": (24, 36, 10, 30)}.items():
        splits = {
            split: read_pairs(ROOT / f"recipes/samples/{pair}/{split}.jsonl", pair)
            for split in ("search", "train", "dev", "test")
        }
        check_disjoint(splits)
        assert tuple(len(part) for part in splits.values()) == sizes


def test_a_stage_without_its_split(tmp_path: Path, toy_data: dict[str, Path]) -> None:
    data = {split: file for split, file in toy_data.items() if split != "train"}
    recipe = parse_recipe(toy_recipe(Path("x"), data, tmp_path, search={"given": [1]}, heal={}))
    with pytest.raises(UserError, match=r"heal needs a train split.*data\.<name>\.train"):
        read_splits(recipe)
