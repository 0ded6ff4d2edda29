"""What was removed and why, for a terminal."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from raylp.errors import UserError
from raylp.report import numbers
from raylp.report.contents import Candidate, Plan, read_plan
from raylp.rundir import RunDir

METRIC = "chrF2++"


def render_plan(rundir: RunDir, console: Console) -> None:
    """The removed layers in order, a strip of all layers, and each round's winner, runner-up and reason.

    Raises:
        UserError: there is no plan yet.
    """
    if not rundir.exists("plan.json"):
        raise UserError(
            f"{rundir.url} has no plan.json: run `raylp search RECIPE` first, or give the run_dir of a recipe"
        )
    plan = read_plan(rundir)
    stack = f", stack {plan.stack}" if plan.stack else ""
    console.print(f"{plan.model or 'model'}: {plan.num_layers} layers{stack}", markup=False, highlight=False)
    in_order = numbers.layers(plan.removed) or "none"
    console.print(f"removed, in this order: {in_order}", style="bold", markup=False, highlight=False)
    console.print(strip(plan))
    console.print("Indices are the original model's; [n] is removed.", style="dim", markup=False, highlight=False)
    if not plan.searched:
        console.print("The layers were given, not searched for: no candidates were scored.", highlight=False)
        return
    console.print()
    console.print(rounds_table(plan))
    if plan.baseline is not None:
        whole = numbers.plus_minus(plan.baseline, METRIC)
        console.print(f"With all layers: {whole}.", highlight=False)
    console.print(reason(plan), style="dim", markup=False, highlight=False)


def strip(plan: Plan) -> Text:
    """`0 1 2 [3] 4`, wrapped between layers only."""
    text = Text()
    for index in range(plan.num_layers):
        gone = index in plan.removed
        text.append(f"[{index}]" if gone else str(index), style="bold red" if gone else "green")
        text.append(" ")
    text.rstrip()
    return text


def rounds_table(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("round", "removed", "score\nwithout", "change", "runner-up", "ahead\nby", "tried", "sentences"):
        table.add_column(name, justify="right", no_wrap=True)
    for round_ in plan.rounds:
        winner, second = round_.winner, round_.runner_up
        score = round_.score or (winner.score if winner else None)
        removed = numbers.layers(round_.removed)
        if round_.restored:
            removed += f" (back: {numbers.layers(round_.restored)})"
        table.add_row(
            str(round_.number),
            removed or numbers.NONE,
            numbers.plus_minus(score, METRIC),
            numbers.fixed(score.value - round_.before.value, sign=True) if round_.before and score else numbers.NONE,
            _shown(second),
            numbers.fixed(score.value - second.score.value, 2) if score and second and second.score else numbers.NONE,
            str(len(round_.candidates)),
            numbers.count(winner.sentences if winner else None),
        )
    return table


def reason(plan: Plan) -> str:
    """How a layer was chosen, in words."""
    early = any(round_.dropped_early(candidate) for round_ in plan.rounds for candidate in round_.candidates)
    text = (
        f"In each round every candidate was left out in turn and {METRIC} taken on the search sentences; "
        "the one whose absence cost the least was removed for good. Change: what the round did to the score."
    )
    return text + (" Candidates that fell behind were dropped before all sentences were scored." if early else "")


def _shown(candidate: Candidate | None) -> str:
    if candidate is None:
        return numbers.NONE
    return escape(f"{numbers.layers(candidate.layers, '+')}: {numbers.score(candidate.score, METRIC)}")
