"""What a search maximises, from rows that add up."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import toy_recipe

from raylp.errors import UserError
from raylp.metrics.intervals import paired_difference, score_with_interval
from raylp.metrics.ngram import metric
from raylp.metrics.objective import Objective, columns_of, influence, load_metric
from raylp.recipe import parse_recipe

HYPOTHESES = ["the cat sat there", "a dog barks at night", "it rains", "we go home now"]
REFERENCES = ["the cat sat on it", "a dog barks by night", "it is raining", "we are going home"]


def rows(objective: Objective, pair: str, hypotheses: list[str], references: list[str]):
    parts = {name: objective.metric(name, pair).statistics(hypotheses, references) for name, _ in objective.weights}
    return objective.rows(parts, pair)


@pytest.mark.parametrize("name", ["chrF2++", "BLEU"])
def test_a_single_metric_is_itself(name: str) -> None:
    objective = Objective.of({name: 1.0}, ["en-de", "en-de"])
    whole = rows(objective, "en-de", HYPOTHESES, REFERENCES)
    plain = metric(name).statistics(HYPOTHESES, REFERENCES)
    assert objective.score(whole.sum(0)) == metric(name).score(plain.sum(0))
    assert objective.signature == metric(name).signature and objective.name == name
    assert score_with_interval(objective, whole) == score_with_interval(metric(name), plain)


def test_a_mix_is_the_weighted_sum() -> None:
    objective = Objective.of({"chrF2++": 0.7, "BLEU": 0.3}, ["en-de"])
    whole = rows(objective, "en-de", HYPOTHESES, REFERENCES)
    scores = [metric(n).score(metric(n).statistics(HYPOTHESES, REFERENCES).sum(0)) for n in ("chrF2++", "BLEU")]
    assert objective.score(whole.sum(0)) == pytest.approx(0.7 * scores[0] + 0.3 * scores[1])
    assert objective.name == "0.7 chrF2++ + 0.3 BLEU" and "0.3*BLEU[en-de:" in objective.signature


def test_pairs_are_scored_apart_and_averaged() -> None:
    """Each pair with its own tokenisation; a pair with many sentences counts no more than one with few."""
    objective = Objective.of({"BLEU": 1.0}, ["en-de", "en-zh"])
    chinese = (["我们现在回家去吧", "天在下雨了吗"], ["我们现在回家了", "天在下雨了"])
    first = rows(objective, "en-de", HYPOTHESES, REFERENCES)
    second = rows(objective, "en-zh", *chinese)
    assert first.shape[1] == second.shape[1] == 2 * columns_of("BLEU")
    scores = [
        metric("BLEU").score(metric("BLEU").statistics(HYPOTHESES, REFERENCES).sum(0)),
        metric("BLEU", "zh").score(metric("BLEU", "zh").statistics(*chinese).sum(0)),
    ]
    assert scores[1] > 0 and metric("BLEU").signature != metric("BLEU", "zh").signature
    assert objective.score(np.concatenate([first, second]).sum(0)) == pytest.approx(sum(scores) / 2)
    assert objective.score(first.sum(0)) == pytest.approx(scores[0])
    assert objective.filed("BLEU", "en-de") == "BLEU" != objective.filed("BLEU", "en-zh")


@pytest.mark.parametrize("name", ["chrF2++", "BLEU"])
def test_influence_gives_the_bootstrap_s_error(name: str) -> None:
    random = np.random.default_rng(0)
    words = [f"wort{i}" for i in range(50)]
    references = [" ".join(random.choice(words, 8)) for _ in range(150)]
    worse = [" ".join(w if random.random() < 0.6 else random.choice(words) for w in r.split()) for r in references]
    better = [" ".join(w if random.random() < 0.7 else random.choice(words) for w in r.split()) for r in references]
    objective = Objective.of({name: 1.0}, ["en-de"])
    a, b = (rows(objective, "en-de", texts, references) for texts in (better, worse))
    difference = influence(objective.score, a) - influence(objective.score, b)
    bootstrap = paired_difference(objective, a, b)
    assert difference.mean() == pytest.approx(0, abs=1e-6)
    assert difference.std(ddof=1) / 150**0.5 == pytest.approx((bootstrap.high - bootstrap.low) / 3.92, rel=0.1)


def test_a_function_of_the_user_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "def short(hypotheses, references, sources):\n    return [-len(h) for h in hypotheses]\n"
        "def few(hypotheses, references, sources):\n    return [1.0]\n"
        "def broken(hypotheses, references, sources):\n    return 1 / 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    chosen = load_metric("mine:short")
    assert chosen.score(chosen.statistics(HYPOTHESES, REFERENCES).sum(0)) == -np.mean([len(h) for h in HYPOTHESES])
    assert "source:" in chosen.signature
    with pytest.raises(UserError, match="one finite number for each"):
        load_metric("mine:few").statistics(HYPOTHESES, REFERENCES)
    with pytest.raises(UserError, match="mine:broken failed: ZeroDivisionError"):
        load_metric("mine:broken").statistics(HYPOTHESES, REFERENCES)
    with pytest.raises(UserError, match="the module must be importable"):
        load_metric("mine:absent")
    with pytest.raises(UserError, match="the module must be importable"):
        load_metric("nowhere:short")
    (tmp_path / "wrong.py").write_text("def (:\n")
    with pytest.raises(UserError, match="SyntaxError"):
        load_metric("wrong:short")


def section(tmp_path: Path, **search: object):
    content = toy_recipe(Path("m"), {"search": Path("s"), "test": Path("t")}, tmp_path, search={"remove": 1, **search})
    recipe = parse_recipe(yaml.safe_load(yaml.safe_dump(content)))
    assert recipe.search is not None
    return recipe.search


def test_objectives_in_a_recipe(tmp_path: Path) -> None:
    assert section(tmp_path).objective == {"chrF2++": 1.0}
    assert section(tmp_path, metric="chrf++").objective == {"chrF2++": 1.0}
    assert section(tmp_path, objective="bleu").objective == {"BLEU": 1.0}
    assert section(tmp_path, objective={"chrF++": 1, "BLEU": 0.5}).objective == {"chrF2++": 1.0, "BLEU": 0.5}


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"objective": {"BLEU": -1}}, "weights above 0"),
        ({"objective": "chrff"}, "no metric 'chrff'"),
        ({"strategy": "oneshot", "beam": 2}, "beam and per_round are for the other strategies"),
        ({"beam": 2, "per_round": 2}, "do not go together"),
        ({"layers": [4, 0], "remove": None}, "at least 1 has to stay"),
        ({"layers": 3, "parameters": 1e6}, "set one of layers"),
        ({"strategy": "rase"}, "race"),
        ({"swaps": 1, "max_loss": 2.0}, "leave one of them out"),
        ({"layers": [], "remove": None}, "at least 1 has to stay"),
        ({"objective": "likelihood", "short_heal": {}}, "leave likelihood out of the objective"),
        ({"objective": ["chrF++", "likelihood"], "backend": "vllm"}, "would load both backends"),
    ],
)
def test_wrong_searches(tmp_path: Path, search: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        section(tmp_path, **search)
