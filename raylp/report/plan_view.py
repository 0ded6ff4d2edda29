"""What was removed and why, for a terminal."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from raylp.errors import UserError
from raylp.report import numbers
from raylp.report.contents import Candidate, Plan, Round, read_plan
from raylp.report.search_words import (
    at_the_floor,
    joint_sentences,
    measure_value,
    objective_digits,
    objective_label,
    objective_word,
    search_lines,
)
from raylp.rundir import RunDir


def render_plan(rundir: RunDir, console: Console) -> None:
    """The removed layers in order, a strip of all layers, how the search went, and each round's winner and
    runner-up.

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
    weights = plan.objective or {"chrF2++": 1.0}
    objective, digits = objective_label(weights), objective_digits(weights, plan)
    console.print()
    for line in (*search_lines(plan, objective, digits), *joint_sentences(plan, digits)):
        console.print(line, markup=False, highlight=False)
    if plan.rounds:
        console.print(rounds_table(plan, objective, digits))
    if plan.baseline is not None:
        whole = numbers.plus_minus(plan.baseline, objective, digits)
        console.print(f"With all layers: {whole}.", markup=False, highlight=False)
    for line in notes(plan, objective_word(weights)) if plan.rounds else []:
        console.print(line, style="dim", markup=False, highlight=False)


def strip(plan: Plan) -> Text:
    """`0 1 2 [3] 4`, wrapped between layers only."""
    text = Text()
    for index in range(plan.num_layers):
        gone = index in plan.removed
        text.append(f"[{index}]" if gone else str(index), style="bold red" if gone else "green")
        text.append(" ")
    text.rstrip()
    return text


def rounds_table(plan: Plan, objective: str, digits: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    costly = any(round_.cost.sentences is not None for round_ in plan.rounds)
    names = ("round", "out", "score\nwithout", "change", "runner-up", "ahead\nby", "tried", "scored\non")
    for name in (*names, "gener-\nated") if costly else names:
        narrow = {"out": 4, "runner-up": 9}.get(name)
        table.add_column(name, justify="right", no_wrap=narrow is None, min_width=narrow)
    for round_ in plan.rounds:
        removed = numbers.layers(round_.removed)
        if round_.restored:
            removed += f" (back: {numbers.layers(round_.restored)})"
        if round_.swap and not removed:
            removed = "none"
        if round_.floor is not None:
            removed += " *"
        row = [
            str(round_.number),
            removed or numbers.NONE,
            numbers.plus_minus(round_.reached, objective, digits),
            _change(round_, digits),
            _shown(round_, digits),
            _ahead(round_, digits),
            str(len(round_.candidates)),
            numbers.count(round_.reached.n if round_.reached else None),
        ]
        table.add_row(*row, *([numbers.count(round_.cost.sentences)] if costly else []))
    return table


def notes(plan: Plan, objective: str) -> list[str]:
    """How to read the table: what decided, and what its marks mean."""
    early = any(round_.dropped_early(candidate) for round_ in plan.rounds for candidate in round_.candidates)
    if plan.strategy == "oneshot":
        text = "Layers were ordered once, before anything was removed; the runner-up is the next in that order."
    else:
        measure = "the likelihood of the references" if plan.strategy == "sleb" else objective
        text = (
            f"In each round every candidate was left out in turn and {measure} taken on the search sentences; "
            "the one whose absence cost the least was removed for good."
        )
    found = [f"{text} Change: what the round did to the score."]
    if early:
        found[0] += " Candidates that fell behind were dropped before all sentences were scored."
    if any(_apart(round_) for round_ in plan.rounds):
        found.append("Ahead by: on the sentences both were scored on, which may be fewer than the score without is of.")
    if any(round_.change and not round_.like_for_like for round_ in plan.rounds):
        found.append("~ the two scores are of different numbers of sentences: the change is rough.")
    if at_the_floor(plan):
        found.append("* no candidate was better than noise; see noise floor above.")
    return found


def _apart(round_: Round) -> bool:
    """Whether the winner was scored further than the runner-up was when it lost."""
    second, score = round_.runner_up, round_.reached
    return bool(not round_.by_importance and second and score and score.n and second.sentences != score.n)


def _change(round_: Round, digits: int) -> str:
    if round_.change is None:
        return numbers.NONE
    return ("" if round_.like_for_like else "~") + numbers.fixed(round_.change.value, digits, sign=True)


def _ahead(round_: Round, digits: int) -> str:
    if round_.ahead is None:
        return numbers.NONE
    return numbers.general(round_.ahead) if round_.by_importance else numbers.fixed(round_.ahead, max(2, digits))


def _shown(round_: Round, digits: int) -> str:
    second = round_.runner_up
    if second is None:
        return numbers.NONE
    return escape(f"{_label(second)}: {measure_value(round_, round_.measured(second), digits)}")


def _label(candidate: Candidate) -> str:
    back = f" for {numbers.layers(candidate.back, '+')}" if candidate.back else ""
    return numbers.layers(candidate.layers, "+") + back
