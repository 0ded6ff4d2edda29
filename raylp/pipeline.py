"""The stages of a run in order: each is done once, and again only for another run."""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from raylp import __version__, cluster
from raylp.asks import asks
from raylp.context import Context, Splits
from raylp.data.corpus import Pair, read_pairs, read_sources
from raylp.data.languages import pair_of, split_pair
from raylp.data.prompt import Prompt, choose_examples
from raylp.data.splits import SPLITS, check_disjoint, cut, text_hash
from raylp.errors import UserError
from raylp.generate.translate import read_stop_rule
from raylp.heal.disk import checkpoint_bytes
from raylp.machine import SERVING, machine, versions
from raylp.metrics.objective import check as check_objective
from raylp.metrics.registry import check as check_metric
from raylp.models.checkpoint import count_parameters, is_expert, numbered_tensors, stack_size
from raylp.models.load import load_tokenizer
from raylp.models.source import fingerprint, licence, locate
from raylp.names import CUT_KINDS, REPAIRED, choose_models, kind_of, whole_of
from raylp.progress import Reporter, heartbeat
from raylp.quantize.schemes import SCHEMES
from raylp.recipe import Recipe, binding, differences, dump_recipe, parse_recipe
from raylp.rundir import RunDir
from raylp.search.legs import stops_of
from raylp.search.targets import given_depths, target_of

SCHEMA = 1


@dataclass(frozen=True)
class Stage:
    """`sections`: of the recipe that it depends on; `needs`: stages before it; `splits`: of the data it reads."""

    name: str
    sections: tuple[str, ...]
    needs: tuple[str, ...]
    splits: tuple[str, ...]
    run: Callable[[Context], dict[str, Any]]
    wanted: Callable[[Recipe], bool]


def _late(module: str, function: str) -> Callable[[Context], dict[str, Any]]:
    """A stage's function, imported when it runs: engines are slow to import."""

    def run(context: Context) -> dict[str, Any]:
        import importlib

        return getattr(importlib.import_module(module), function)(context)

    return run


def _has(section: str) -> Callable[[Recipe], bool]:
    return lambda recipe: getattr(recipe, section) is not None


def _heals(*when: str) -> Callable[[Recipe], bool]:
    return lambda recipe: recipe.heal is not None and recipe.heal.when in when


def _repairs(recipe: Recipe) -> bool:
    return recipe.repair is not None and recipe.search is not None


MODELS = ("adapt", "prune", "repair", "heal")
RESULTS = (*MODELS, "quantize")

STAGES = (
    Stage("adapt", ("heal",), (), ("train",), _late("raylp.heal.stage", "adapt"), _heals("before", "both")),
    Stage("search", ("search",), ("adapt",), ("search",), _late("raylp.search.stage", "search"), _has("search")),
    Stage("prune", (), ("search",), (), _late("raylp.search.prune", "prune"), _has("search")),
    Stage("repair", ("repair",), ("prune",), ("train",), _late("raylp.repair.stage", "repair"), _repairs),
    Stage("distill", ("distill",), ("adapt",), ("train",), _late("raylp.distill.stage", "distill"), _has("distill")),
    Stage(
        "heal",
        ("heal",),
        ("prune", "repair", "distill"),
        ("train",),
        _late("raylp.heal.stage", "heal"),
        _heals("after", "both"),
    ),
    Stage("quantize", ("quantize",), MODELS, ("train",), _late("raylp.quantize.stage", "quantize"), _has("quantize")),
    Stage("evaluate", ("evaluate",), RESULTS, ("test",), _late("raylp.evaluate.stage", "evaluate"), _has("evaluate")),
    Stage("bench", ("bench", "serve"), RESULTS, ("test",), _late("raylp.bench.stage", "bench"), _has("bench")),
)


def wanted_stages(recipe: Recipe) -> list[Stage]:
    """The stages the recipe asks for, in order."""
    return [stage for stage in STAGES if stage.wanted(recipe)]


def read_by(stage: Stage, recipe: Recipe) -> tuple[str, ...]:
    """The splits a stage of this recipe reads: a search that heals candidates also needs text to train on, a teacher
    may have sources of its own, and a training that dev ends or chooses from needs dev.
    """
    if stage.name == "distill" and recipe.distill is not None:
        return (recipe.distill.sources,)
    if stage.name in ("adapt", "heal") and recipe.heal is not None:
        learned = () if stage.name == "heal" and recipe.heal.data == "teacher" else stage.splits
        return (*learned, "dev") if recipe.heal.looks_at_dev else learned
    if stage.name == "quantize" and recipe.quantize is not None:
        return stage.splits if recipe.quantize.calibrated else ()
    heals = stage.name == "search" and recipe.search is not None and recipe.search.heals
    return (*stage.splits, "train") if heals else stage.splits


def depends_on(stage: Stage, recipe: Recipe) -> tuple[str, ...]:
    """The splits that a stage's result depends on, among them those it can do without: what a teacher says is rejected
    where it is near any held-out sentence, and of several epochs the best on dev is kept.
    """
    further = {"distill": ("train", "search", "dev", "test"), "adapt": ("dev",), "heal": ("dev",)}
    return tuple(dict.fromkeys((*read_by(stage, recipe), *further.get(stage.name, ()))))


def find_stage(recipe: Recipe, name: str) -> Stage:
    """The stage called `name`.

    Raises:
        UserError: the recipe does not have it.
    """
    for stage in wanted_stages(recipe):
        if stage.name == name:
            return stage
    if name == "heal" and recipe.heal is not None:
        raise UserError("heal.when: before has the model trained before it is pruned: raylp run does so")
    section = "search" if name == "prune" else name
    raise UserError(f"the recipe has no stage {name!r}: add a section '{section}:' to it (docs/recipe.md)")


def open_context(recipe: Recipe, reporter: Reporter) -> Context:
    """Reads data and model's configuration, and refuses what could only fail later."""
    rundir = RunDir(recipe.run_dir)
    if recipe.evaluate is not None and not rundir.exists("evaluate.json"):
        for name in recipe.evaluate.metrics:
            check_metric(name)
    splits = read_splits(recipe)
    with reporter.task("model") as task, heartbeat(task):  # a first time it may be fetched or converted
        original = locate(recipe.model.name, recipe.model.revision, reporter.line)
    section = recipe.prompt
    prompt = Prompt(
        template=section.template,
        examples=choose_examples(splits.train, section.examples),
        chat=section.chat,
        bound=section.bound,
    )
    for corpus in recipe.data:
        prompt.ask("", _pair_of(recipe, corpus))
    if section.examples and not splits.train:
        raise UserError("prompt.examples are taken from the train split, and no corpus has one: name data.<name>.train")
    dtype = recipe.model.dtype
    if dtype == "auto" and rundir.exists("manifest.json"):  # a run that goes on elsewhere goes on as it began
        dtype = rundir.read_json("manifest.json")["model"]["dtype"]
    elif dtype == "auto":
        dtype = "bfloat16" if cluster.num_gpus() else "float32"
    context = Context(recipe, rundir, splits, prompt, original, dtype, reporter)
    check_model(context)
    if recipe.distill is not None and not rundir.complete("distill"):
        from raylp.distill.stage import check as check_distill

        check_distill(context)
    done = rundir.read_json("manifest.json")["stages"] if rundir.exists("manifest.json") else {}
    if recipe.quantize is not None and "quantize" not in done:
        from raylp.quantize.stage import check as check_quantize

        check_quantize(context)
    return context


def check_names(context: Context, only: str | None) -> None:
    """The models that the sections of all stages, or of `only` one, name will be made, or are there already.

    Raises:
        UserError: with the name, and what there will be.
    """
    recipe, rundir = context.recipe, context.rundir
    heal, quantised = recipe.heal, recipe.quantize
    made = ["baseline"]
    made += ["pruned"] if recipe.search is not None else []
    made += [REPAIRED[method] for method in recipe.repair.methods] if recipe.repair is not None else []
    if heal is not None:
        made += ["original"] if heal.when != "after" else []
        made += ["healed", *(["baseline-healed"] if heal.baseline else [])] if heal.when != "before" else []
    asked: dict[str, Sequence[str]] = {"quantize.models": quantised.models if quantised else ()}
    asked["evaluate.models"] = (recipe.evaluate.models or ()) if recipe.evaluate else ()
    asked["bench.models"] = (recipe.bench.models or ()) if recipe.bench else ()

    def known(name: str, key: str) -> bool:
        whole, scheme = whole_of(name), name[len(whole_of(name)) + 1 :]
        kind = kind_of(whole)
        if kind not in made or (kind != whole and kind not in CUT_KINDS):
            return False
        if kind != whole and (depths := _depths(context)) and int(whole.removeprefix(f"{kind}-")) not in depths:
            return False
        if not scheme:
            return True
        # A variant is named in full: `healed` stands for the run's one, `healed-gptq` for none.
        named = quantised is not None and {whole, kind} & set(quantised.models) and scheme in quantised.schemes
        return bool(named) and key != "quantize.models" and (kind != whole or kind not in CUT_KINDS)

    for key, names in asked.items():
        for name in names if only in (None, key.partition(".")[0]) else ():
            there = known(name, key) or any(name in (own, kind_of(own)) for own in rundir.names("models"))
            if not there:
                depths = _depths(context)
                at = f", cut to {' and '.join(map(str, sorted(depths)))} layers" if depths else ""
                raise UserError(f"{key}: this recipe makes no model {name!r}; it makes {', '.join(made)}{at}")


def check_model(context: Context) -> None:
    """The model has a decoder stack, layers that can be left out, and enough of them for the recipe."""
    from raylp.models.load import check_layers, model_class

    model_class(context.original)
    check_layers(context.original)
    num_layers = stack_size(context.original)
    heal, search = context.recipe.heal, context.recipe.search
    if heal is not None and heal.method == "qlora" and any(map(is_expert, numbered_tensors(context.original))):
        raise UserError(
            "heal.method: qlora leaves a mixture's experts, most of its weights, in 16 bits: set it to lora or full"
        )
    if search is None:
        return
    if search.given is not None:
        given_depths(search, num_layers)
        return
    target_of(search, context.original)
    rundir = context.rundir
    if not (rundir.exists("manifest.json") and "search" in rundir.read_json("manifest.json")["stages"]):
        for name in search.objective:
            check_objective(name)


def _depths(context: Context) -> set[int] | None:
    """The numbers of layers that stay in the models of the run, where the recipe says so."""
    section = context.recipe.search
    if section is None or section.max_loss is not None:
        return None
    num_layers = stack_size(context.original)
    if section.given is not None:
        return {depth["layers"] for depth in given_depths(section, num_layers)}
    return {num_layers - section.remove} if section.remove is not None else set(section.depths) or None


def read_splits(recipe: Recipe) -> Splits:
    """Reads, cuts and limits the corpora; no sentence is in two splits.

    Raises:
        UserError: a file is wrong, splits overlap, or a stage of the recipe has nothing to read.
    """
    joined: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    tests: dict[str, list[Pair]] = {}
    mono: list[Pair] = []
    for name, corpus in recipe.data.items():
        pair = _pair_of(recipe, name)
        if corpus.path is not None and corpus.cut is not None:
            sizes = {key: value for key, value in corpus.cut.model_dump().items() if value is not None}
            parts = cut(read_pairs(corpus.path, pair), sizes)
        else:
            files = {split: getattr(corpus, split) for split in SPLITS}
            parts = {split: read_pairs(file, pair) for split, file in files.items() if file is not None}
        if corpus.mono is not None:
            mono += read_sources(corpus.mono, pair)[: corpus.limit.mono]
        for split, examples in parts.items():
            kept = examples[: getattr(corpus.limit, split)]
            if split == "test":
                if kept:
                    tests[name] = kept
            else:
                joined[split] += kept
    check_disjoint(
        {**{s: joined[s] for s in ("search", "train", "dev")}, "test": [e for t in tests.values() for e in t]}
    )
    splits = Splits(joined["search"], joined["train"], joined["dev"], tests, mono)
    for stage in wanted_stages(recipe):
        given = recipe.search is not None and recipe.search.given is not None
        for split in read_by(stage, recipe):
            if not getattr(splits, split) and not (stage.name == "search" and given):
                raise UserError(f"{stage.name} needs a {split} split, and no corpus has one: name data.<name>.{split}")
    return splits


def run(
    recipe: Recipe,
    reporter: Reporter | None = None,
    only: str | None = None,
    finish: Callable[[RunDir], None] | None = None,
) -> RunDir:
    """Runs the stages of the recipe that are not done yet, or `only` one; returns the run directory.

    `finish` is called at the end, still under the lock (the report).

    Raises:
        UserError: wrong recipe, data, model or resources; another driver; or a stage that failed.
    """
    reporter = reporter or Reporter()
    if only is not None:
        find_stage(recipe, only)
    context = open_context(recipe, reporter)
    check_names(context, only)
    rundir = context.rundir
    rundir.check_writable(needed_disk(context))
    with rundir.lock():
        old = check_same_recipe(rundir, recipe)
        # The places named first stay named: those of a job's copy do not last.
        data = old.data if old is not None and all(map(os.path.isfile, old.data_files())) else recipe.data
        rundir.write_text("recipe.yaml", dump_recipe(recipe.model_copy(update={"data": data})))
        manifest = open_manifest(context)
        prints = fingerprints(context)

        def is_done(stage: Stage) -> bool:
            done = manifest["stages"].get(stage.name)
            return done and done["fingerprint"] == prints[stage.name] and outputs_there(context, stage.name)

        stages = [stage for stage in wanted_stages(recipe) if only in (None, stage.name)]
        # What was begun, or is to be taken over, may have all it needs.
        begun = {"distill": bool(recipe.cache or rundir.names("distill")), "bench": bool(rundir.names("bench"))}
        to_do = [s.name for s in stages if asks(recipe, [s.name]) and not begun.get(s.name) and not is_done(s)]
        cluster.require_early(recipe.resources, asks(recipe, to_do))
        for stage in stages:
            _check_needs(recipe, stage, manifest, prints)
            done = manifest["stages"].get(stage.name)
            if is_done(stage):
                reporter.line(f"{stage.name}: done before, in {done['seconds']:.0f} s")
                continue
            if done and done["fingerprint"] != prints[stage.name] and stage.name != "bench":
                raise UserError(
                    f"{stage.name} was done on other inputs (data or model files changed since, or raylp itself): "
                    f"use a new run_dir, or put them back"
                )
            started = time.monotonic()
            summary = stage.run(context)
            seconds = time.monotonic() - started
            gpus = cluster.num_gpus()
            manifest["stages"][stage.name] = {
                "fingerprint": prints[stage.name],
                "seconds": round(seconds, 1),
                "gpu_seconds": round(seconds * gpus, 1),
                "finished": _now(),
                "summary": summary,
            }
            manifest["data"] = _data_entry(context)  # what no stage had read by then may have changed
            rundir.write_json("manifest.json", manifest)
            reporter.line(f"{stage.name}: {seconds:.0f} s")
        if rundir.exists("bench.json") or rundir.exists("evaluate.json"):
            from raylp.evaluate.results import write_results

            write_results(rundir)
        if finish is not None:
            finish(rundir)
    return rundir


def outputs_there(context: Context, stage: str) -> bool:
    """Whether what a finished stage left is still whole."""
    rundir = context.rundir
    plan = rundir.read_json("plan.json") if rundir.exists("plan.json") else {}
    gone = [depth["removed"] for depth in plan.get("depths") or []] or [plan.get("removed", [])]
    depths = [plan.get("num_layers", 0) - len(removed) for removed in gone]
    repair = context.recipe.repair
    methods = [REPAIRED[method] for method in repair.methods] if repair is not None else []
    models = {
        "adapt": ["adapted"],
        "prune": [f"pruned-{depth}" for depth in (depths[:1] if "legs" in plan else depths)],
        "repair": [f"{kind}-{depth}" for kind in methods for depth in depths],
        "heal": [f"healed-{depth}" for depth in depths],
    }
    files = {"search": "plan.json", "evaluate": "evaluate.json", "bench": "bench.json"}
    if context.recipe.heal is not None and context.recipe.heal.baseline:
        models["heal"].append("baseline-healed")
    if stage == "quantize" and context.recipe.quantize is not None:
        section = context.recipe.quantize
        chosen = choose_models(section.models, context.models(), "quantize.models")
        models[stage] = [f"{name}-{scheme}" for name in chosen for scheme in section.schemes]
    if stage in models:
        return all(rundir.complete(f"models/{name}") for name in models[stage])
    if stage == "bench":  # requests that failed are to be measured again
        return rundir.exists(files[stage]) and not rundir.read_json(files[stage]).get("errors")
    return rundir.complete("distill") if stage == "distill" else rundir.exists(files[stage])


def check_same_recipe(rundir: RunDir, recipe: Recipe) -> Recipe | None:
    """A run directory belongs to one recipe; only resources, serve, bench, cache and `FREE_KEYS` may change, and the
    place of data files. Returns the recipe so far.

    Raises:
        UserError: with the keys, old and new values.
    """
    if not rundir.exists("recipe.yaml"):
        return None
    old = parse_recipe(yaml.safe_load(rundir.read_text("recipe.yaml")), rundir.uri("recipe.yaml"))
    changed = differences(old, recipe)
    if changed:
        told = "; ".join(f"{key} was {before!r}, is now {after!r}" for key, before, after in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"run directory {rundir.url} is of another recipe: {told}{more}; use another run_dir (--set run_dir=...)"
        )
    return old


def fingerprints(context: Context) -> dict[str, str]:
    """For each stage, a hash of everything its result depends on: its section, data, prompt, model, stages before."""
    recipe, splits = binding(context.recipe), context.splits
    rows: dict[str, list[Any]] = {
        split: [[e.id, e.source, e.target, e.pair] for e in getattr(splits, split)]
        for split in ("search", "train", "dev", "mono")
    }
    rows["test"] = [[n, e.id, e.source, e.target] for n, own in splits.test.items() for e in own]
    tokenizer = load_tokenizer(context.original)
    stop = sorted(read_stop_rule(context.original, tokenizer, context.prompt.newline).stop)
    found: dict[str, str] = {}
    for stage in wanted_stages(context.recipe):
        examples = [row for split in depends_on(stage, context.recipe) for row in rows[split]]
        content = [
            {key: recipe.get(key) for key in stage.sections},
            [found[name] for name in stage.needs if name in found],
            examples,
            context.prompt.model_dump(mode="json"),
            fingerprint(context.original),
            context.dtype,
            stop,
        ]
        if stage.name == "distill" and (teacher := _teacher_print(context)):
            content.append(teacher)
        if stage.name == "bench":  # speed is of a machine and its engines
            content += [machine(), versions(SERVING)]
        found[stage.name] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return found


def _teacher_print(context: Context) -> str | None:
    """The fingerprint of a teacher in a directory of its own, or what was noted of it where that is gone since."""
    config, rundir = context.recipe.distill, context.rundir
    if config is None or not config.is_another:
        return None
    if Path(config.teacher).is_dir():
        return fingerprint(Path(config.teacher))
    summary = rundir.read_json("distill/summary.json") if rundir.complete("distill") else {}
    return summary["fingerprint"] if summary.get("teacher_in") == "directory" else None


def open_manifest(context: Context) -> dict[str, Any]:
    """manifest.json as it is, or a new one."""
    rundir = context.rundir
    if rundir.exists("manifest.json"):
        return rundir.read_json("manifest.json")
    parameters, size = count_parameters(context.original)
    manifest = {
        "schema": SCHEMA,
        "raylp": __version__,
        "created": _now(),
        "versions": {"python": platform.python_version(), **versions()},
        "machine": machine(),
        "model": {
            "name": context.recipe.model.name,
            "fingerprint": fingerprint(context.original),
            "licence": licence(context.original),
            "layers": stack_size(context.original),
            "parameters": parameters,
            "bytes": size,
            "dtype": context.dtype,
        },
        "data": _data_entry(context),
        "seeds": {"heal": context.recipe.heal.seed if context.recipe.heal else None},
        "logs": str(rundir.logs()),
        "stages": {},
        "notes": [],
    }
    rundir.write_json("manifest.json", manifest)
    return manifest


def num_depths(context: Context) -> int:
    """How many models are pruned."""
    section = context.recipe.search
    return max(1, len(_stops(context) or (section.depths if section is not None else ())))


def _stops(context: Context) -> list[int]:
    """The depths at which a model is healed on the way, as `stops_of` has them."""
    return stops_of(context.recipe, stack_size(context.original))


def needed_disk(context: Context) -> int:
    """Bytes the models and checkpoints of the run will take, roughly."""
    size = count_parameters(context.original)[1]
    copies = 0
    if context.recipe.search is not None:
        depths = num_depths(context)
        copies += depths * (1 + (len(context.recipe.repair.methods) if context.recipe.repair is not None else 0))
    checkpoints = 0
    if context.recipe.heal is not None:
        when, baseline = context.recipe.heal.when, context.recipe.heal.baseline
        copies += (num_depths(context) + baseline if when != "before" else 0) + (when != "after")
        if baseline:  # after every leg it is healed too
            legs = [f"legs/{stop}/models/baseline-healed" for stop in _stops(context)[:-1]]
            copies += sum(not context.rundir.complete(leg) for leg in legs)
        checkpoints = checkpoint_bytes(context.original, context.recipe.heal)
    names = [name for name in context.rundir.names("models") if context.rundir.complete(f"models/{name}")]
    left = max(0, copies - sum(whole_of(name) == name for name in names))
    variants = 0
    if (quantize := context.recipe.quantize) is not None:
        # What vLLM quantises is linked; the rest keeps its vocabulary, and takes the whole at the most.
        made = len(quantize.models) * sum(SCHEMES[scheme].maker != "vllm" for scheme in quantize.schemes)
        variants = max(0, made - sum(whole_of(name) != name for name in names))
    return (left + variants) * size + (checkpoints if left else 0) + 200_000_000


def _check_needs(recipe: Recipe, stage: Stage, manifest: dict[str, Any], prints: dict[str, str]) -> None:
    for need in stage.needs:
        how = "raylp run RECIPE" if need == "adapt" else f"raylp {need} RECIPE, or raylp run RECIPE for all of it"
        if need in prints and manifest["stages"].get(need, {}).get("fingerprint") != prints[need]:
            raise UserError(f"{stage.name} needs {need} first: {how}")


def _pair_of(recipe: Recipe, name: str) -> str:
    pair = pair_of(name, recipe.data[name].pair)
    split_pair(pair)
    return pair


def _data_entry(context: Context) -> dict[str, Any]:
    def entry(examples: list[Pair]) -> dict[str, Any]:
        return {"n": len(examples), "sha256": text_hash(examples)}

    splits = context.splits
    shared = {name: entry(getattr(splits, name)) for name in ("search", "train", "dev")}
    if splits.mono:
        shared["mono"] = entry(splits.mono)
    return {**shared, **{f"test {name}": entry(examples) for name, examples in splits.test.items()}}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
