"""Every metric by its name: sacrebleu's n-gram metrics, and COMET by the name or place of a checkpoint."""

import difflib
from collections.abc import Callable
from pathlib import Path

from raylp.beside import COMET
from raylp.metrics import comet, ngram

# Checkpoints that may be named without their owner.
KNOWN_COMET = tuple(
    f"Unbabel/{name}"
    for name in (
        *("wmt22-comet-da", "wmt20-comet-da", "eamt22-cometinho-da", "wmt22-unite-da", "XCOMET-XL", "XCOMET-XXL"),
        *("wmt20-comet-qe-da", "wmt22-cometkiwi-da", "wmt23-cometkiwi-da-xl", "wmt23-cometkiwi-da-xxl"),
    )
)
_USUAL = {
    **{"chrf++": "chrF2++", "chrf2++": "chrF2++", "bleu": "BLEU"},
    **{name.rpartition("/")[2].lower(): name for name in KNOWN_COMET},
}


def full_name(name: str) -> str:
    """The one spelling of a metric's name: `chrF2++`, `BLEU`, a COMET checkpoint as `owner/name` or as a path.

    Raises:
        ValueError: no metric has that name; with the nearest that one has.
    """
    if comet.is_path(name):
        return name
    owner, slash, checkpoint = name.partition("/")
    if slash:
        if owner and checkpoint and "/" not in checkpoint:
            return name
        raise ValueError(f"no metric {name!r}: a COMET checkpoint is owner/name on the hub, or a path such as ./{name}")
    if name.lower() in _USUAL:
        return _USUAL[name.lower()]
    if near := difflib.get_close_matches(name.lower(), _USUAL, n=1):
        raise ValueError(f"no metric {name!r}; did you mean {short_name(_USUAL[near[0]])!r}?")
    known = ", ".join(ngram.NAMES)
    raise ValueError(f"no metric {name!r}; known: {known}, or a COMET checkpoint such as wmt22-comet-da")


def is_comet(name: str) -> bool:
    """Whether `full_name(name)` is a COMET checkpoint."""
    return full_name(name) not in ngram.NAMES


def short_name(name: str) -> str:
    """What scores are filed and shown under: `chrF2++`, `wmt22-comet-da`."""
    return comet.short_name(full_name(name)) if is_comet(name) else full_name(name)


def check(name: str) -> None:
    """Refuses a metric that cannot be computed here; nothing is loaded or fetched.

    Raises:
        UserError: COMET's environment or a local checkpoint is not there.
    """
    if is_comet(name):
        COMET.require()
        if comet.is_path(name):
            comet.checkpoint_file(name)


def open_metric(
    name: str,
    target_language: str = "",
    log: Path | None = None,
    advance: Callable[[int], object] | None = None,
) -> "ngram.NgramMetric | comet.CometMetric":
    """The metric called `name`; close it when done. `log` and `advance` are COMET's.

    Raises:
        ValueError: no metric has that name.
        UserError: COMET's environment or a local checkpoint is not there.
    """
    if is_comet(name):
        return comet.CometMetric(full_name(name), log=log, advance=advance)
    return ngram.metric(full_name(name), target_language)
