"""`raylp export`: a model of a run as a directory for others. No engine and no Ray are needed."""

import shutil
from collections.abc import Callable
from pathlib import Path

from raylp.errors import UserError
from raylp.export.card import facts_of, model_card
from raylp.export.wmt26 import write_submission
from raylp.models.checkpoint import copy_checkpoint, write_card
from raylp.models.source import find_notices
from raylp.names import CUT_KINDS, kind_of
from raylp.rundir import RunDir

FORMATS = ("hf", "wmt26")


def export(
    rundir: RunDir,
    target: Path,
    form: str = "hf",
    model: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> str:
    """Writes `model` of the run (default: the healed one with the fewest layers, else the pruned one) to `target`.

    `hf`: the checkpoint with a model card; `wmt26`: the directory that WMT26's model compression task runs. `target`
    appears whole or not at all. Returns the model's name.

    Raises:
        UserError: the run has no such model, `target` has something in it, or the form is not known.
    """
    if form not in FORMATS:
        raise UserError(f"--format {form!r}: one of {', '.join(FORMATS)}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--to {target}: something is there already; name a directory that is not, or remove it")
    target = target.absolute()
    name = choose(rundir, model)
    facts = facts_of(rundir, name)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        checkpoint = partial if form == "hf" else partial / "workdir" / "model"
        tell(f"copying {name}")
        copy_checkpoint(rundir.local(f"models/{name}"), checkpoint)
        # The base is named as others know it, not by where it lay on this machine.
        write_card(checkpoint, {**facts.card, "base_model": facts.cut_from})
        for notice in find_notices(facts.base, facts.revision):
            shutil.copyfile(notice, checkpoint / notice.name)
        (checkpoint / "README.md").write_text(model_card(facts), encoding="utf-8")
        if form == "wmt26":
            write_submission(rundir, facts, partial)
        if target.exists():
            target.rmdir()
        partial.replace(target)
    except OSError as error:
        raise UserError(f"--to {target}: cannot be written: {error}", 1) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return name


def choose(rundir: RunDir, wanted: str | None) -> str:
    """The model to export: as asked, or the best the run has.

    Raises:
        UserError: the run has none, or not that one.
    """
    names = [name for name in rundir.names("models") if rundir.complete(f"models/{name}")]
    if not names:
        raise UserError(f"{rundir.url} has no models yet: run `raylp run RECIPE` to its end first")
    if wanted in names:
        return str(wanted)
    kinds = (wanted,) if wanted else ("healed", "pruned", *CUT_KINDS, "adapted", "baseline-healed")
    for kind in kinds:
        # The one with the fewest layers: of the same kind, the shortest number, then the least.
        found = sorted((name for name in names if kind_of(name) == kind), key=lambda name: (len(name), name))
        if found:
            return found[0]
    raise UserError(f"--model {wanted}: the run has no such model; it has {', '.join(sorted(names))}")
