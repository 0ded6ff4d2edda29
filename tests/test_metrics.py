"""Scores are sacrebleu's own, from statistics that add up."""

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from raylp.metrics.intervals import paired_difference, score_with_interval
from raylp.metrics.ngram import metric

REFERENCES = [
    "Der Zug kommt heute spät.",
    "Wo ist mein Schlüssel?",
    "Sie kauft frisches Brot.",
    "Es regnet seit drei Tagen.",
]
HYPOTHESES = ["Der Zug kommt spät heute.", "Wo sind meine Schlüssel?", "", "Es regnet seit Tagen drei"]


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.text("abc .", max_size=20), st.text("abc .", min_size=1, max_size=20)), min_size=1, max_size=6
    )
)
def test_sums_of_statistics_are_the_corpus_score(rows: list[tuple[str, str]]) -> None:
    hypotheses, references = [list(side) for side in zip(*rows, strict=True)]
    chrf, bleu = metric("chrF2++"), metric("BLEU")
    whole = sacrebleu.corpus_chrf(hypotheses, [references], word_order=2).score
    assert chrf.score(chrf.statistics(hypotheses, references).sum(0)) == pytest.approx(whole, abs=1e-9)
    whole = sacrebleu.corpus_bleu(hypotheses, [references]).score
    assert bleu.score(bleu.statistics(hypotheses, references).sum(0)) == pytest.approx(whole, abs=1e-9)


def test_statistics_of_parts_are_parts_of_the_statistics() -> None:
    chrf = metric("chrF2++")
    whole = chrf.statistics(HYPOTHESES, REFERENCES)
    parts = np.concatenate(
        [chrf.statistics(HYPOTHESES[:1], REFERENCES[:1]), chrf.statistics(HYPOTHESES[1:], REFERENCES[1:])]
    )
    assert (whole == parts).all()


def test_intervals() -> None:
    chrf = metric("chrF2++")
    statistics = chrf.statistics(HYPOTHESES * 8, REFERENCES * 8)
    score = score_with_interval(chrf, statistics)
    assert score.low < score.value < score.high and score.n == 32
    assert "nw:2" in score.signature and "version:" in score.signature
    assert score == score_with_interval(chrf, statistics)
    same = paired_difference(chrf, statistics, statistics)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    better = chrf.statistics(REFERENCES * 8, REFERENCES * 8)
    assert paired_difference(chrf, better, statistics).low > 0
    with pytest.raises(ValueError, match="paired"):
        paired_difference(chrf, better, statistics[:3])


def test_coverage_of_the_interval() -> None:
    """Of many samples from one population, about 95% of the intervals hold the population's score."""
    chrf = metric("chrF2++")
    rng = np.random.default_rng(0)
    words = np.array(["zug", "brot", "tag", "haus", "kind"])
    pairs = [(" ".join(rng.choice(words, 4)), " ".join(rng.choice(words, 4))) for _ in range(2000)]
    population = chrf.statistics([a for a, _ in pairs], [b for _, b in pairs])
    truth = chrf.score(population.sum(0))
    held = 0
    for _ in range(60):
        sample = population[rng.choice(2000, 50, replace=False)]
        score = score_with_interval(chrf, sample, resamples=200)
        held += score.low <= truth <= score.high
    assert held >= 50


def test_bleu_cuts_chinese_by_character() -> None:
    assert "tok:zh" in metric("BLEU", "zh_Hans").signature
    assert "tok:13a" in metric("BLEU", "de").signature
