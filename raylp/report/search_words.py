"""The search in words: how it decided, at what risk, above what noise, at what cost, and why it ended."""

from collections.abc import Mapping

from raylp.report import numbers
from raylp.report.contents import Plan, Round, Stat

STRATEGIES = {"race": "race", "exhaustive": "exhaustive", "sleb": "SLEB", "oneshot": "one shot"}
LIKELIHOOD_LOSS = "loss of the references, nats per token"


def objective_label(weights: Mapping[str, float]) -> str:
    """`chrF2++`, or for a mix `0.5 × chrF2++ + 50 × wmt22-comet-da`."""
    names = {name: numbers.metric_name(name) for name in weights}
    if len(names) == 1:
        return next(iter(names.values()))
    return " + ".join(f"{weight:g} × {names[name]}" for name, weight in weights.items())


def objective_word(weights: Mapping[str, float]) -> str:
    """The objective within a sentence, where a mix's label would be too long."""
    return objective_label(weights) if len(weights) == 1 else "the weighted sum"


def objective_digits(weights: Mapping[str, float], plan: Plan | None) -> int:
    """Decimals of the objective, the same for all its scores and differences."""
    names = list(weights)
    if len(names) == 1 and names[0].startswith(("chrF", "BLEU", "TER")):
        return 1
    if set(names) <= {"likelihood", "agreement"}:
        return 3
    scores = [] if plan is None else [plan.baseline, *(round_.reached for round_ in plan.rounds)]
    most = max((abs(score.value) for score in scores if score), default=1.0)
    return 3 if most <= 1.5 else 2 if most <= 15 else 1


def measure_label(round_: Round, objective: str) -> str:
    """What a round went by."""
    if not round_.by_importance:
        return objective
    return round_.criterion.replace("-", " ") if round_.criterion else LIKELIHOOD_LOSS


def measure_value(round_: Round, stat: Stat | None, digits: int) -> str:
    """A figure of what a round went by."""
    if stat is None:
        return numbers.NONE
    return numbers.general(stat.value) if round_.by_importance else numbers.fixed(stat.value, digits)


def strategy_sentence(plan: Plan) -> str:
    """How layers were chosen; nothing where the plan does not say."""
    if plan.strategy == "race":
        text = "Race: all candidates start on the same few sentences, those that can no longer win are dropped."
        if plan.risk is not None:
            text += (
                f" Stated risk {100 * plan.risk:.3g}%: in at most so many rounds it takes a layer that scoring "
                "everything would have found clearly worse than its own choice."
            )
        return text
    if plan.strategy == "exhaustive":
        return "Exhaustive: every candidate was scored on all search sentences in every round."
    if plan.strategy == "sleb":
        return (
            "SLEB: round by round, the layer went whose absence cost the references the least likelihood; "
            "nothing was translated to decide."
        )
    if plan.strategy == "oneshot":
        criterion = next((round_.criterion for round_ in plan.rounds if round_.criterion), "one criterion")
        return (
            f"One shot: layers were ordered once, by {criterion.replace('-', ' ')} in the whole model; the lowest went."
        )
    return ""


def at_the_floor(plan: Plan) -> list[Round]:
    return [round_ for round_ in plan.rounds if round_.floor is not None]


def floor_sentences(plan: Plan, digits: int) -> list[str]:
    """The noise floor, and which rounds it made undecidable by the objective."""
    if plan.noise is None and not at_the_floor(plan):
        return []
    # Healed models have a noise of their own: the most of those that a round was held against.
    noise = max([r.floor.noise for r in plan.rounds if r.floor] or [plan.noise or 0.0])
    objective = objective_word(plan.objective or {"chrF2++": 1.0})
    text = [
        f"Translations of other sentences reach {numbers.fixed(noise, digits)} by {objective}: below that is noise."
    ]
    found = at_the_floor(plan)
    likely = [round_.number for round_ in found if round_.by_importance]
    by_heal = [r.number for r in found if r.floor and r.floor.decided_by.startswith("a short heal")]
    rest = [r.number for r in found if not r.by_importance and r.number not in by_heal]
    if likely:
        text.append(
            f"In {rounds_named(likely)} no candidate was better than that, so {objective} could not tell them apart: "
            f"{'it was' if len(likely) == 1 else 'they were'} decided by the likelihood of the references."
        )
    if by_heal:
        text.append(
            f"In {rounds_named(by_heal)} no candidate was better than that: the likeliest were healed for a few steps, "
            f"and the best of them taken."
        )
    if rest:
        text.append(
            f"In {rounds_named(rest)} no candidate was better than that, and {objective} decided all the same: the "
            f"{'choice is' if len(rest) == 1 else 'choices are'} little better than chance."
        )
    if not found and plan.strategy not in ("sleb", "oneshot"):
        text.append("Every round had a candidate above it.")
    return text


def rounds_named(rounds: list[int]) -> str:
    """`round 3`, `rounds 3 to 5`, `rounds 3 and 7`."""
    if len(rounds) == 1:
        return f"round {rounds[0]}"
    if len(rounds) > 2 and rounds == list(range(rounds[0], rounds[-1] + 1)):
        return f"rounds {rounds[0]} to {rounds[-1]}"
    return f"rounds {numbers.layers(rounds[:-1])} and {rounds[-1]}"


def sentences_spent(plan: Plan) -> int | None:
    """Sentences translated by the whole search, the unpruned model's among them."""
    if plan.spent.sentences is not None:
        return plan.spent.sentences
    counts = [round_.generated for round_ in plan.rounds]
    if not counts or any(count is None for count in counts):
        return None
    return sum(count or 0 for count in counts) + ((plan.baseline.n or 0) if plan.baseline else 0)


def sentences_of_everything(plan: Plan) -> int | None:
    """Sentences that scoring the unpruned model and every candidate of every round in full takes."""
    if plan.sentences is None:
        return None
    starts = 1 + sum(round_.start is not None for round_ in plan.rounds)
    return plan.sentences * (starts + sum(len(round_.candidates) for round_ in plan.rounds))


def cost_sentence(plan: Plan) -> str:
    """`4,608 sentences generated, 4.1 times fewer than the 18,816 of ...; 7 min 12 s of workers’ time`."""
    spent, whole, parts = sentences_spent(plan), sentences_of_everything(plan), []
    if spent is not None and whole:
        text = f"{numbers.count(spent)} sentences generated"
        if spent > 0 and whole / spent >= 1.05:
            text += f", {numbers.fixed(whole / spent)} times fewer than"
        elif spent >= whole / 1.05 and spent <= whole * 1.05:
            text += ", as many as"
        elif spent:
            text += f", {numbers.fixed(spent / whole)} times as many as"
        else:
            text += ", against"
        parts.append(f"{text} the {numbers.count(whole)} of scoring every candidate on all {plan.sentences} sentences")
    if plan.spent.forced_sentences:
        parts.append(f"{numbers.count(plan.spent.forced_sentences)} scored by likelihood, without generating")
    if plan.spent.seconds:
        time = f"{numbers.duration(plan.spent.seconds)} of workers’ time"
        if plan.spent.gpu_seconds:
            time += f", {numbers.duration(plan.spent.gpu_seconds)} of GPU time"
        parts.append(time)
    return "; ".join(parts)


def joint_sentences(plan: Plan, digits: int) -> list[str]:
    """What layers taken at once cost together, round by round."""
    found = []
    for round_ in plan.rounds:
        for joint in round_.joint:
            verdict = "taken" if set(joint.layers) == set(round_.removed) else "too much"
            found.append(
                f"Round {round_.number}: {numbers.layers(joint.layers, ' + ')} together cost "
                f"{numbers.fixed(joint.loss, digits)}, allowed {numbers.fixed(joint.allowed, digits)}: {verdict}."
            )
    return found


def swap_sentence(plan: Plan) -> str:
    """How many refining moves there were, and whether they helped."""
    moves = [round_ for round_ in plan.rounds if round_.swap]
    if not moves:
        return ""
    helped = sum(bool(round_.removed) for round_ in moves)
    end = " The last one found nothing better." if not moves[-1].removed else ""
    if not helped:
        return "Swaps at the end (a layer back, another out) found nothing better."
    return f"{helped} swap{'s' if helped > 1 else ''} at the end (a layer back, another out) helped.{end}"


def healed_sentences(plan: Plan, objective: str, digits: int) -> list[str]:
    """Where the model was healed before the search went on."""
    return [
        f"Before round {round_.number} the model was healed at {round_.start} layers"
        + (f": {objective} {numbers.plus_minus(round_.before, objective, digits)}." if round_.before else ".")
        for round_ in plan.rounds
        if round_.start is not None
    ]


def search_facts(plan: Plan, objective: str, digits: int) -> list[tuple[str, list[str]]]:
    """Names, and sentences under each; what the plan does not say is left out."""
    word = objective_word(plan.objective or {"chrF2++": 1.0})
    depths = [
        f"{layers} layers left: without {numbers.layers(removed) or 'none'}"
        + (f" ({word} {numbers.plus_minus(score, objective, digits)})" if score else "")
        for layers, removed in plan.depths
        for score in [plan.score_without(removed)]
    ]
    groups = [
        ("Strategy", [strategy_sentence(plan), swap_sentence(plan)]),
        ("Objective", [objective_sentence(plan, objective)] if plan.objective else []),
        ("Noise floor", floor_sentences(plan, digits)),
        ("Cost", [f"{cost}." if (cost := cost_sentence(plan)) else ""]),
        ("Several at once", joint_sentences(plan, digits)),
        ("Healed on the way", healed_sentences(plan, word, digits)),
        ("Depths", depths if len(depths) > 1 else []),
        ("Ended early", [f"{plan.stopped[:1].upper()}{plan.stopped[1:].rstrip('.')}."] if plan.stopped else []),
    ]
    return [(name, said) for name, texts in groups if (said := [text for text in texts if text])]


def objective_sentence(plan: Plan, objective: str) -> str:
    """What was to be kept as high as possible."""
    if len(plan.objective) > 1:
        return f"A weighted sum: {objective}. Points and losses here are of that sum."
    if plan.strategy in ("sleb", "oneshot"):
        return f"{objective} is reported, but did not decide."
    return {
        "likelihood": "likelihood: the mean log-probability of a reference’s token, in nats.",
        "agreement": "agreement: minus the divergence from the unpruned model (KL), in nats per token.",
    }.get(objective, f"{objective}, of all search sentences together.")


def search_lines(plan: Plan, objective: str, digits: int) -> list[str]:
    """The same for a terminal: a line each."""
    if not plan.searched:
        return []
    how = [STRATEGIES.get(plan.strategy, plan.strategy), f"objective {objective}"]
    if plan.risk is not None:
        how.insert(1, f"risk {plan.risk:.3g} a round")
    floor = floor_sentences(plan, digits)
    depths = [f"{layers} ({numbers.layers(removed) or 'none'})" for layers, removed in plan.depths]
    lines = [
        ("search", ", ".join(part for part in how if part) if plan.strategy else ""),
        ("cost", cost_sentence(plan) if plan.spent.sentences is not None else ""),
        ("noise floor", " ".join(floor)),
        ("refined", swap_sentence(plan)),
        ("healed on the way", " ".join(healed_sentences(plan, objective, digits))),
        ("layers left", "; ".join(depths) if len(depths) > 1 else ""),
        ("ended early", plan.stopped),
    ]
    return [f"{name}: {text}" for name, text in lines if text]
