"""The stage that quantises models of the run: a checkpoint for each model and scheme, made in a process of its own."""

import importlib.metadata
import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raylp import cluster, machine
from raylp.bench.ideal import work
from raylp.beside import COMPRESSOR
from raylp.context import Context
from raylp.data.corpus import Pair
from raylp.data.prompt import beside_examples
from raylp.data.splits import text_hash
from raylp.data.tokens import examples_of
from raylp.errors import UserError
from raylp.models.checkpoint import (
    card_for,
    copy_beside_weights,
    copy_checkpoint,
    is_expert,
    is_router,
    layer_costs,
    quantised_facts,
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
    pairs = calibration(context, section) if section.calibrated else []
    made = []
    for name, path in models.items():
        for scheme in section.schemes:
            target = f"{name}-{scheme}"
            _make(context, section, target, path, scheme, pairs)
            size = sizes(context.rundir.local(f"models/{target}"))["bytes"]
            made.append({"model": target, "bytes": size, "bytes_before": sizes(path)["bytes"]})
    return {"models": made}


def check(context: Context) -> None:
    """Before anything starts: is there what each scheme needs to be made, and to be run?

    Raises:
        UserError: a scheme needs a GPU, an environment or a data type that is not there, or the layers do not divide.
    """
    section, recipe = _section(context), context.recipe
    far = cluster.address_of(recipe.resources)  # a cluster, whose GPUs are not seen from here
    on_cpu = not far and not cluster.num_gpus()
    for name in section.schemes:
        scheme = SCHEMES[name]
        if on_cpu and scheme.avx512 and not machine.computes_4_bit():
            raise UserError(
                f"quantize.schemes: {name} ({scheme.what}): on a CPU, vLLM computes with 4-bit weights only where "
                f"there is AVX-512, and this one has none: leave it out, or take w8a8 or nf4"
            )
        if on_cpu and not scheme.on_cpu:
            raise UserError(
                f"quantize.schemes: {name} ({scheme.what}) runs on GPUs that compute in 8-bit floating point, such as "
                f"the L4 and the H100, and there is no GPU here: leave it out"
            )
        if scheme.maker == "llm-compressor":
            COMPRESSOR.require()
        dtypes = {"evaluate.dtype": recipe.evaluate.dtype if recipe.evaluate is not None else "auto"}
        if recipe.bench is not None:
            dtypes |= {"serve.dtype": recipe.serve.dtype}
            dtypes |= {"model.dtype": recipe.model.dtype} if recipe.serve.dtype == "auto" else {}
        if scheme.maker == "vllm" and (wrong := [key for key, dtype in dtypes.items() if dtype == "float32"]):
            raise UserError(
                f"quantize.schemes: {name} computes in bfloat16 or float16: set {' and '.join(wrong)} to auto"
            )
    if {"gptq", "awq"} & set(section.schemes):
        _check_matrices(context.original, section.group_size, on_cpu=on_cpu)


def _check_matrices(path: Path, group_size: int, on_cpu: bool) -> None:
    """There are kernels of vLLM for the layers' matrices, and they divide as those want them."""
    layers = read_tensors(path).layers
    if on_cpu and any(is_expert(name) for layer in layers for name in layer):
        raise UserError(
            "quantize.schemes: gptq and awq: on a CPU, vLLM computes no mixture of experts with 4-bit weights: leave "
            "them out, or take w8a8 or nf4"
        )
    shapes = {shape for layer in layers for shape in _matrices(layer)}
    inputs, outputs = {shape[1] for shape in shapes}, {shape[0] for shape in shapes}
    if on_cpu and (odd := sorted(n for n in inputs | outputs if n % 32)):
        raise UserError(
            f"quantize.schemes: gptq and awq: on a CPU, vLLM wants multiples of 32, but layers of the model have "
            f"{', '.join(map(str, odd))} inputs or outputs: leave them out"
        )
    if wrong := sorted(n for n in inputs if n % group_size):
        fits = [size for size in (128, 64, 32) if not any(n % size for n in inputs)]
        raise UserError(
            f"quantize.group_size: {group_size} weights share a scale, but layers of the model have "
            f"{', '.join(map(str, wrong))} inputs: {f'set it to {fits[0]}' if fits else 'leave gptq and awq out'}"
        )


def calibration(context: Context, section: Quantize) -> list[Pair]:
    """The training pairs that weights are calibrated on."""
    pairs = beside_examples(context.splits.train, context.prompt.examples, section.sentences)
    if not pairs:
        raise UserError("quantize: no training pair is left beside the prompt's examples: add training text")
    return pairs


def is_made(there: dict[str, Any] | None, card: dict[str, Any]) -> bool:
    """Whether a variant's card says what `card` does, but for the library's version, and for the calibration text where
    an earlier raylp did not note it.
    """
    known, told = quantised_facts(there), card["quantized"]
    unnoted = {key: told[key] for key in ("calibration",) if key in told}
    found = {key: value for key, value in (unnoted | known).items() if key != "version"}
    return there is not None and {**there, "quantized": found} == card


def _tokens(context: Context, pairs: Sequence[Pair]) -> list[list[int]]:
    """Token ids of training pairs as the model sees them: prompt and translation."""
    examples = examples_of(pairs, context.prompt, load_tokenizer(context.original))
    return [[*example.prompt, *example.target] for example in examples]


def _section(context: Context) -> Quantize:
    assert context.recipe.quantize is not None
    return context.recipe.quantize


def _matrices(layer: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Shapes of the weight matrices of a layer, but a mixture's router: (outputs, inputs)."""
    shapes = [tuple(entry["shape"]) for name, entry in layer.items() if not is_router(name)]
    return [shape for shape in shapes if len(shape) == 2]


def _make(context: Context, section: Quantize, name: str, source: Path, scheme: str, pairs: Sequence[Pair]) -> None:
    kind = SCHEMES[scheme]
    told: dict[str, Any] = {"scheme": scheme, "of": fingerprint(source), "maker": kind.maker, "bits": kind.bits}
    if kind.calibrated:
        told |= {"sentences": len(pairs), "calibration": {"split": "train", "sha256": text_hash(pairs)}}
    if scheme in ("gptq", "awq"):
        told["group_size"] = section.group_size
    # What the packed weights no longer show.
    costs = layer_costs(source)
    told |= {
        "params": sizes(source)["params"],
        "layer_params": list(costs.parameters),
        "expert_params": work(source).experts,
    }
    # What an earlier run's card says of its model is not what this run says.
    card = (read_card(source) if source != context.original else None) or card_for(
        context.recipe.model.name, fingerprint(context.original), "", [], context.prompt.model_dump(mode="json")
    )
    card = {**card, "quantized": told}
    if context.rundir.complete(f"models/{name}") and is_made(read_card(context.rundir.local(f"models/{name}")), card):
        return
    if kind.maker == "vllm":  # it quantises the weights each time it loads them
        with context.rundir.building(f"models/{name}") as target:
            copy_checkpoint(source, target, link=True)
            write_card(target, card)
        return
    command, version = [sys.executable, "-m", "raylp.quantize.bits"], importlib.metadata.version("bitsandbytes")
    if kind.maker == "llm-compressor":
        python, version = COMPRESSOR.require()
        command = [str(python), str(COMPRESS)]
    card["quantized"] = {**told, "version": version}
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
            "texts": _tokens(context, pairs) if kind.calibrated else [],
        }
        job.write_text(json.dumps(content))

        def beat() -> None:
            reached = LAYER.findall(log.read_text(errors="replace"))
            task.update(task.done, f"layer {reached[-1]}" if reached else "")

        if problem := run_apart([*command, str(job)], log, beat):
            raise UserError(f"quantize {name}: {kind.maker} failed: {problem}; log: {log}", 1)
        copy_beside_weights(source, target)
        write_card(target, card)
        if not quantised_layers(target):
            raise UserError(f"quantize {name}: {kind.maker} found no linear layer that it knows; log: {log}", 1)
