"""The stage that quantises models of the run: a checkpoint for each model and scheme, made in a process of its own."""

import json
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raylp import cluster
from raylp.context import Context
from raylp.data.tokens import examples_of
from raylp.errors import UserError
from raylp.models.checkpoint import (
    card_for,
    copy_beside_weights,
    copy_checkpoint,
    layer_costs,
    quantised_layers,
    read_card,
    read_tensors,
    sizes,
    write_card,
)
from raylp.models.load import load_tokenizer
from raylp.models.source import fingerprint
from raylp.names import choose_models, whole_of
from raylp.process import run_apart
from raylp.quantize.compressor import require_compressor
from raylp.quantize.config import Quantize
from raylp.quantize.schemes import SCHEMES

COMPRESS = Path(__file__).with_name("compress.py")
LAYER = re.compile(r"\blayers\.(\d+)\b")


def quantize(context: Context) -> dict[str, Any]:
    """Writes models/<name>-<scheme> for the models and schemes the recipe names; what is there already stays.

    Raises:
        UserError: a model is missing, or a library failed; with its last line.
    """
    section = _section(context)
    whole = {name: path for name, path in context.models().items() if whole_of(name) == name}
    models = choose_models(section.models, whole, "quantize.models")
    texts = calibration(context, section) if section.calibrated else []
    made = []
    for name, path in models.items():
        for scheme in section.schemes:
            target = f"{name}-{scheme}"
            _make(context, section, target, path, scheme, texts)
            size = sizes(context.rundir.local(f"models/{target}"))["bytes"]
            made.append({"model": target, "bytes": size, "bytes_before": sizes(path)["bytes"]})
    return {"models": made}


def check(context: Context) -> None:
    """Before anything starts: is there what each scheme needs to be made, and to be run?

    Raises:
        UserError: a scheme needs a GPU or an environment that is not there, or the model's layers do not divide.
    """
    section = _section(context)
    for name in section.schemes:
        scheme = SCHEMES[name]
        if not scheme.on_cpu and not cluster.num_gpus():
            raise UserError(
                f"quantize.schemes: {name} ({scheme.what}) runs on GPUs that compute in 8-bit floating point, such as "
                f"the L4 and the H100, and there is no GPU here: leave it out"
            )
        if scheme.maker == "llm-compressor":
            require_compressor()
    if {"gptq", "awq"} & set(section.schemes):
        shapes = {shape for layer in read_tensors(context.original).layers for shape in _matrices(layer)}
        wrong = sorted({inputs for _, inputs in shapes if inputs % section.group_size})
        if wrong:
            fits = [size for size in (128, 64, 32, 16, 8) if not any(inputs % size for _, inputs in shapes)]
            advice = f"set it to {fits[0]}" if fits else "leave gptq and awq out"
            raise UserError(
                f"quantize.group_size: {section.group_size} weights share a scale, but layers of the model have "
                f"{', '.join(map(str, wrong))} inputs: {advice}"
            )


def calibration(context: Context, section: Quantize) -> list[list[int]]:
    """Token ids of training pairs as the model sees them: prompt and translation. Those in the prompt are left out."""
    shown = {source for examples in context.prompt.examples.values() for source, _ in examples}
    pairs = [pair for pair in context.splits.train if pair.source not in shown][: section.sentences]
    if not pairs:
        raise UserError("quantize: no training pair is left beside the prompt's examples: add training text")
    examples = examples_of(pairs, context.prompt, load_tokenizer(context.original))
    return [[*example.prompt, *example.target] for example in examples]


def _section(context: Context) -> Quantize:
    assert context.recipe.quantize is not None
    return context.recipe.quantize


def _matrices(layer: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Shapes of the weight matrices of a layer: (outputs, inputs)."""
    return [tuple(entry["shape"]) for entry in layer.values() if len(entry["shape"]) == 2]


def _make(context: Context, section: Quantize, name: str, source: Path, scheme: str, texts: list[list[int]]) -> None:
    kind = SCHEMES[scheme]
    told: dict[str, Any] = {"scheme": scheme, "of": fingerprint(source), "maker": kind.maker, "bits": kind.bits}
    if kind.calibrated:
        told["sentences"] = len(texts)
    if scheme in ("gptq", "awq"):
        told["group_size"] = section.group_size
    # What the packed weights no longer show.
    costs = layer_costs(source)
    told |= {"params": sizes(source)["params"], "layer_params": list(costs.parameters)}
    card = read_card(source) or card_for(
        context.recipe.model.name, fingerprint(context.original), "", [], context.prompt.model_dump(mode="json")
    )
    card = {**card, "quantized": told}
    if context.rundir.complete(f"models/{name}") and read_card(context.rundir.local(f"models/{name}")) == card:
        return
    if kind.maker == "vllm":  # it quantises the weights each time it loads them
        with context.rundir.building(f"models/{name}") as target:
            copy_checkpoint(source, target, link=True)
            write_card(target, card)
        return
    log = context.rundir.logs() / f"quantize-{name}.log"
    with (
        context.reporter.task(f"quantize {name}") as task,
        context.rundir.building(f"models/{name}") as target,
        tempfile.TemporaryDirectory(prefix="raylp-quantize-") as scratch,
    ):
        job = Path(scratch) / "job.json"
        content = {
            "source": str(source),
            "target": str(target),
            "scheme": scheme,
            "group_size": section.group_size,
            "texts": texts if kind.calibrated else [],
        }
        job.write_text(json.dumps(content))
        command = [sys.executable, "-m", "raylp.quantize.bits"]
        if kind.maker == "llm-compressor":
            command = [str(require_compressor()[0]), str(COMPRESS)]

        def beat() -> None:
            reached = LAYER.findall(log.read_text(errors="replace"))
            task.update(task.done, f"layer {reached[-1]}" if reached else "")

        if problem := run_apart([*command, str(job)], log, beat):
            raise UserError(f"quantize {name}: {kind.maker} failed: {problem}; log: {log}", 1)
        copy_beside_weights(source, target)
        write_card(target, card)
        if not quantised_layers(target):
            raise UserError(f"quantize {name}: {kind.maker} found no linear layer that it knows; log: {log}", 1)
