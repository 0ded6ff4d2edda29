"""The command line: `raylp VERB`. Results on stdout, progress on stderr; exit 0, 1 (failed) or 2 (wrong usage)."""

import codecs
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from raylp import __version__
from raylp.errors import UserError

app = typer.Typer(
    name="raylp",
    help="Take layers out of language models, guided by what the task loses.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

RecipeArgument = Annotated[Path, typer.Argument(help="The recipe, a YAML file (recipes/ has examples).")]
RunArgument = Annotated[str, typer.Argument(help="The run directory, such as runs/demo.")]
SetOption = Annotated[
    list[str], typer.Option("--set", help="Override a value of the recipe: key=value, such as search.remove=4.")
]

INTERRUPTED = 130  # what typer makes of Ctrl-C

state = {"debug": False}


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"raylp {__version__}")
        raise typer.Exit


VERSION = typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_print_version)


@app.callback()
def main_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, VERSION] = False,
) -> None:
    """Options of every verb."""
    state["debug"] = debug


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: SetOption = [],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done and what it would cost.")] = False,
) -> None:
    """Every stage of a recipe in order; run again, it goes on where it stopped.

    Example: `raylp run recipes/demo.yaml --set run_dir=runs/mine --set search.layers=14`
    """
    if dry_run:
        from raylp.dry_run import dry_run as estimate
        from raylp.recipe import load_recipe

        estimate(load_recipe(recipe, overrides), sys.stdout)
        return
    _run(recipe, overrides, None)


@app.command()
def search(recipe: RecipeArgument, overrides: SetOption = []) -> None:
    """Find the layers the task does not need, and write plan.json.

    Example: `raylp search recipes/demo.yaml`
    """
    _run(recipe, overrides, "search")


@app.command()
def prune(
    recipe: RecipeArgument,
    overrides: SetOption = [],
    layers: Annotated[
        str | None, typer.Option(help="Layers to remove, such as 13,12,11: a published list, no search is needed.")
    ] = None,
) -> None:
    """Cut the layers of plan.json, or a given list, out of the model.

    Example: `raylp prune recipes/demo.yaml --layers 9,16,17 --set run_dir=runs/published`
    """
    if layers is None:
        _run(recipe, overrides, "prune")
        return
    try:
        given = [int(layer) for layer in layers.split(",")]
    except ValueError:
        raise UserError(f"--layers {layers!r}: write layer numbers with commas between, such as 13,12,11") from None
    from raylp.recipe import load_recipe
    from raylp.search.config import TARGETS

    chosen = [*overrides, *(f"search.{target}=null" for target in TARGETS), f"search.given={given}"]
    if (loaded := load_recipe(recipe, overrides)).heal is not None and loaded.heal.every is not None:
        chosen.append("heal.every=null")  # a list that is given is cut at once
    _run(recipe, chosen, "search", "prune")


@app.command()
def repair(recipe: RecipeArgument, overrides: SetOption = []) -> None:
    """Mend the pruned models without training: the recipe's repair.methods.

    Example: `raylp run recipes/demo.yaml --set 'repair.methods=[compensate, merge]' --set run_dir=runs/repaired`, or
    with this verb that stage of it alone.
    """
    _run(recipe, overrides, "repair")


@app.command()
def distill(recipe: RecipeArgument, overrides: SetOption = []) -> None:
    """Translate the training sources with the teacher, and filter.

    Example: `raylp distill recipes/demo.yaml`
    """
    _run(recipe, overrides, "distill")


@app.command()
def heal(recipe: RecipeArgument, overrides: SetOption = []) -> None:
    """Train the pruned model, and the unpruned one in the same way.

    Example: `raylp heal recipes/demo.yaml`
    """
    _run(recipe, overrides, "heal")


@app.command()
def quantize(recipe: RecipeArgument, overrides: SetOption = []) -> None:
    """Models of the run in fewer bits: the recipe's quantize.models by each of quantize.schemes.

    Example: `raylp run recipes/demo.yaml --set 'quantize.schemes=[w8a8, gptq]' --set run_dir=runs/quantised`, or with
    this verb that stage of it alone.
    """
    _run(recipe, overrides, "quantize")


@app.command()
def evaluate(recipe: RecipeArgument, overrides: SetOption = []) -> None:
    """Translate the test sets with every model of the run, and score.

    Example: `raylp evaluate recipes/demo.yaml`
    """
    _run(recipe, overrides, "evaluate")


@app.command()
def bench(recipe: RecipeArgument, overrides: SetOption = []) -> None:
    """Serve baseline and healed model, and measure latency and throughput.

    Example: `raylp bench recipes/demo.yaml --set bench.requests=64`
    """
    _run(recipe, overrides, "bench")


@app.command()
def serve(
    run_dir: RunArgument,
    overrides: SetOption = [],
    slo: Annotated[
        str | None, typer.Option(help="Such as p90=300ms: model 'auto' is the one with the most layers that keeps it.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the file for `serve deploy`, start nothing.")
    ] = False,
) -> None:
    """The run's models behind one endpoint until Ctrl-C: OpenAI's paths, POST /translate, and a page at /.

    Example: `raylp serve runs/demo --set serve.port=8001 --set 'serve.models=[healed-15]'`
    """
    from raylp.pipeline import open_context
    from raylp.progress import Reporter
    from raylp.rundir import RunDir
    from raylp.screen import engines_to
    from raylp.serve.endpoint import deploy_file
    from raylp.serve.endpoint import serve as serve_models

    asked = [*overrides, *([f"serve.slo={slo}"] if slo is not None else [])]
    recipe = _recipe_of(RunDir(run_dir), asked).model_copy(update={"run_dir": run_dir})
    if dry_run:
        print(deploy_file(open_context(recipe, Reporter(sys.stderr))), end="")
        return
    with engines_to(RunDir(run_dir).logs() / "serve.log") as (out, err):
        serve_models(open_context(recipe, Reporter(err)), out)


@app.command()
def translate(
    model: Annotated[Path, typer.Argument(help="A checkpoint: raylp's or a stock one.")],
    pair: Annotated[str, typer.Option(help="Language pair, such as cs-de.")],
    backend: Annotated[str, typer.Option(help="transformers, vllm, or auto: vllm on a GPU.")] = "transformers",
    batch_size: Annotated[int, typer.Option(min=1, help="Sentences at a time; 1 answers line by line.")] = 16,
    lenient: Annotated[bool, typer.Option("--lenient", help="Take bytes that are no UTF-8 for unknown signs.")] = False,
) -> None:
    """One line in, one line out.

    Example: `echo 'Where is the station?' | raylp translate runs/demo/models/healed-15 --pair en-de`
    """
    from raylp.generate.translate import translate as translate_lines
    from raylp.screen import results_alone

    if backend not in ("transformers", "vllm", "auto"):
        raise UserError(f"--backend {backend!r}: transformers, vllm or auto")
    if sys.stdin.isatty():
        print("reading sentences from the keyboard, one a line; Ctrl-D ends", file=sys.stderr)
    with results_alone() as out:
        translate_lines(model, pair, _stdin_lines(lenient), out, backend=backend, batch_size=batch_size)


@app.command()
def report(run_dir: RunArgument) -> None:
    """Tables on the screen, and report/index.html.

    Example: `raylp report runs/demo`
    """
    from raylp.rundir import RunDir

    _require_run(run_dir)
    _show_report(RunDir(run_dir), sys.stdout)


@app.command()
def export(
    run_dir: RunArgument,
    to: Annotated[Path, typer.Option(help="The directory to write, which is not there yet.")],
    form: Annotated[str, typer.Option("--format", help="hf: checkpoint and model card; wmt26: a submission.")] = "hf",
    model: Annotated[str | None, typer.Option(help="One of the run's models, such as healed-15.")] = None,
) -> None:
    """A model of a run as a directory for others: with a model card, or as WMT26's model compression task runs it.

    Example: `raylp export runs/demo --format hf --to healed-15`
    """
    from raylp.export.export import export as write
    from raylp.rundir import RunDir

    _require_run(run_dir)
    name = write(RunDir(run_dir), to, form, model, lambda note: print(note, file=sys.stderr))
    print(f"{to}  {name}, format {form}")


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(help="Runs, or RUN:MODEL; by default a run's healed model.")],
    resamples: Annotated[int, typer.Option(min=100, help="Of the bootstrap behind every interval.")] = 1000,
) -> None:
    """Models of different runs on the same test text: scores, and differences to the first, with intervals.

    Example: `raylp compare runs/exhaustive runs/race runs/demo:baseline-healed`
    """
    from rich.console import Console

    from raylp.evaluate.compare import compare as compare_models
    from raylp.evaluate.compare import find_entrant, render

    if len(models) < 2:
        raise UserError("name at least two runs, such as: raylp compare runs/exhaustive runs/race")
    found = compare_models([find_entrant(name) for name in models], resamples)
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120).print(render(found))


@app.command()
def plan(run_dir: RunArgument) -> None:
    """What was removed, in the original model's indices, and why.

    Example: `raylp plan runs/demo`
    """
    from rich.console import Console

    from raylp.report.plan_view import render_plan
    from raylp.rundir import RunDir

    _require_run(run_dir)
    rundir = RunDir(run_dir)
    if not rundir.exists("plan.json"):
        raise UserError(f"{run_dir} has no plan.json yet: raylp search RECIPE")
    render_plan(rundir, Console(file=sys.stdout))


@app.command()
def replay(
    run_dir: RunArgument,
    times: Annotated[int, typer.Option(min=1, help="How often each round is replayed.")] = 1000,
    risk: Annotated[float, typer.Option(help="The stated risk of a wrong choice in a round.")] = 0.05,
    block: Annotated[int, typer.Option(min=2, help="Sentences in a block.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the shuffling.")] = 0,
) -> None:
    """What `race` would have chosen in an exhaustive search's rounds, and how many sentences it would have taken.

    Example: `raylp replay runs/exhaustive --times 1000 --risk 0.05`
    """
    from rich.console import Console

    from raylp.progress import Reporter
    from raylp.rundir import RunDir
    from raylp.search.replay import read_recording, render
    from raylp.search.replay import replay as play

    if not 0 < risk < 0.5:
        raise UserError(f"--risk {risk:g}: between 0 and 0.5, such as 0.05")
    _require_run(run_dir)
    recording = read_recording(RunDir(run_dir))
    with Reporter().task("replay", len(recording.rounds) * times) as task:
        found = play(recording, times, risk, block, seed, task.advance)
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 110).print(render(recording, found, times, risk))


@app.command()
def submit(
    recipe: RecipeArgument,
    address: Annotated[str, typer.Option(help="Of the cluster's dashboard, such as http://127.0.0.1:8265.")],
    overrides: SetOption = [],
    python: Annotated[str, typer.Option(help="The Python on the cluster that has raylp's stack.")] = "python",
    follow: Annotated[bool, typer.Option(help="Follow the job's log until it ends.")] = True,
) -> None:
    """The same run as a Ray job.

    Example: `raylp submit recipes/demo.yaml --address http://127.0.0.1:8265`
    """
    from raylp.submit import submit as submit_job

    raise typer.Exit(submit_job(recipe, overrides, address, python, follow, sys.stdout))


@app.command()
def doctor() -> None:
    """Versions, devices, memory, Ray, vLLM: what is wrong and how to mend it.

    Example: `raylp doctor`
    """
    from rich.console import Console

    from raylp import doctor as checks

    found = checks.checks()
    Console(file=sys.stdout).print(checks.render(found), soft_wrap=True)
    if checks.failed(found):
        raise typer.Exit(1)


def main(arguments: list[str] | None = None) -> None:
    """The console script. Every error is one line on stderr; `--debug` adds the traceback."""
    stop = _ignore_second_signal()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale may lack what tables are drawn with
            stream.reconfigure(errors="replace")
    try:
        code = app(arguments, standalone_mode=False) or 0
        if code == INTERRUPTED:
            raise KeyboardInterrupt
    except UserError as error:
        code = _complain(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        stop()
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        code = 1
    except typer.Exit as leave:
        code = leave.exit_code
    except OSError as error:
        code = _complain(f"{error.strerror or error}: {error.filename or 'no file named'}", 1)
    except Exception as error:
        if hasattr(error, "format_message"):  # click's usage errors
            message = error.format_message()  # none where the help was shown
            code = _complain(f"{message} (raylp --help)", 2) if message else 2
        else:
            text = " ".join(str(error).split())[:300]
            code = _complain(
                f"unexpected {type(error).__name__}: {text} (--debug shows where; logs are in the run directory)", 1
            )
    sys.stdout.flush()
    sys.exit(code)


def _complain(message: str, code: int) -> int:
    if state["debug"]:
        traceback.print_exc()
    print(f"raylp: {message}", file=sys.stderr)
    return code


def _ignore_second_signal() -> Callable[[], Any]:
    """SIGTERM stops as Ctrl-C does; either is noted, should an engine swallow the exception."""
    from raylp.progress import interrupted

    interrupted.clear()

    def interrupt(*_: Any) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    return lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run(recipe_path: Path, overrides: list[str], *only: str | None) -> None:
    from raylp.pipeline import run as run_pipeline
    from raylp.progress import Reporter
    from raylp.recipe import load_recipe
    from raylp.rundir import RunDir
    from raylp.screen import engines_to

    recipe = load_recipe(recipe_path, overrides)
    rundir = RunDir(recipe.run_dir)
    rundir.check_writable()
    with engines_to(rundir.logs() / "driver.log") as (out, err):
        reporter = Reporter(err)
        whole, ray_was_there = only == (None,), _ray_runs()
        try:
            for stage in only:
                run_pipeline(recipe, reporter, stage, (lambda done: _show_report(done, out)) if whole else None)
        finally:
            if _ray_runs() and not ray_was_there:
                sys.modules["ray"].shutdown()
        if not whole:
            print(rundir.uri(""), file=out)


def _ray_runs() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def _show_report(rundir: Any, out: TextIO) -> None:
    from rich.console import Console

    from raylp.report.build import report as build_report
    from raylp.report.tables import print_tables

    path = build_report(rundir, None)
    console = Console(file=out, width=None if out.isatty() else 120)
    print_tables(rundir, console)
    print(path, file=out)


def _recipe_of(rundir: Any, overrides: list[str]) -> Any:
    import yaml

    from raylp.recipe import override_recipe, parse_recipe

    _require_run(rundir.url)
    content = yaml.safe_load(rundir.read_text("recipe.yaml"))
    return parse_recipe(override_recipe(content, overrides), rundir.uri("recipe.yaml"))


def _require_run(run_dir: str) -> None:
    from raylp.rundir import RunDir

    if not RunDir(run_dir).exists("recipe.yaml"):
        raise UserError(f"{run_dir} is not a run directory (it has no recipe.yaml): raylp run RECIPE makes one")


def _stdin_lines(lenient: bool) -> Any:
    """Lines of standard input as they come; what is not UTF-8 is refused with its number, or replaced and told."""
    for number, raw in enumerate(sys.stdin.buffer, 1):
        if number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        try:
            yield raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            said = f"standard input, line {number}: not UTF-8 ({error.reason})"
            if not lenient:
                raise UserError(said) from error
            print(said, file=sys.stderr)
            yield raw.decode("utf-8", errors="replace").rstrip("\r\n")


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
