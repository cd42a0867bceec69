"""Every registry line resolves, every implementation has a line, and no file outgrows one idea."""

from __future__ import annotations

import ast
import importlib
import tomllib
from pathlib import Path

import pytest

from layerwise.registry import Registry

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "layerwise"

INFRASTRUCTURE = {
    "allocate/solvers": {
        "base": "the interface",
        "problem": "choices as arrays, shared by the solvers",
        "program": "the integer program, shared by the exact solver and by the mending of others",
    },
    "export": {
        "base": "the interface",
        "dense": "tensors without packing, shared by several",
        "gguf_blocks": "packed matrices as GGML blocks",
        "gguf_metadata": "the table as GGUF metadata",
        "gguf_tensors": "the tensors of a GGUF file",
        "gguf_tokenizer": "the tokenizer as GGUF metadata",
        "source": "what is exported",
    },
    "measure": {
        "answers": "the probability of an answer, shared by studies of one text",
        "backward": "the shared backward pass",
        "base": "the interfaces",
        "class_moments": "moments of states by class, for a module's labelled data",
        "causal_tracing": "a table of tokens by layers for one prompt, not a column",
        "consistency": "agreement of answers, not of layers",
        "concepts": "maps of chosen words for chosen prompts, not a column",
        "edit_scores": "scores an edit, not a layer",
        "edit_study": "scores edits, not layers",
        "departure": "tells groups of items apart along the depth, so it is not a column",
        "effective": "one number for all layers, from columns",
        "effects": "a matrix of source by target layers, not a column",
        "ending": "the end of a pass, shared by what compares outputs",
        "counters": "what the processor counts, whatever runs",
        "energy": "meters",
        "engine": "runs instruments over data",
        "erasure": "a table of depths by tokens for one text, not a column",
        "explained": "regression on scores, not a score",
        "floor": "what rounding alone does to predictions",
        "forward": "the shared forward pass",
        "hardware": "limits of the machine, not of a layer",
        "identity": "which model was measured",
        "in_context": "predicts from a table of any rows",
        "inputs": "data as inputs to a stack",
        "integrated_gradients": "a table of depths by tokens for one text, not a column",
        "journal": "resuming after a kill",
        "knowledge": "brings its own data, facts by kind; its columns join those of a profile",
        "ledger": "the whole life of a model, not its layers",
        "learned_lens": "translators of the tuned lens by gradient descent",
        "linear_map": "compares two models, so it is not a column of one",
        "marginal": "what each edit of a finished plan costs, so it is not a column",
        "memory": "running out of it",
        "module_walk": "the walk of a sweep through any module",
        "neighbours": "distances and dimensions of any cloud of points",
        "partial": "tallies of a part of the data, as files",
        "perturbation": "perturbs parts of any network, which are not rows",
        "neuron_statistics": "every neuron of every layer, not one number a layer",
        "progress": "the progress bar",
        "reading": "the shared walk of what reads a layer beside its states",
        "sample": "which positions are looked at",
        "scores": "the result",
        "scores_files": "the result as a file",
        "seen": "what a pass shows to instruments",
        "sensitivity": "what predictions feel of each channel, vectors that errors are weighed with",
        "separation": "tells two groups of states apart, so it is not a column",
        "specific_neurons": "picks neurons, not layers",
        "swap_states": "states of one prompt in the run of another, not a column",
        "spectral_entropy": "profiles of depth, compared across models",
        "similarity": "two models layer against layer",
        "sweep": "the shared walk of interventions",
        "tally": "running means",
        "trace": "predictions of one changed walk, not a column",
        "timing": "clocks",
        "track": "tokens chosen by the caller, followed through the lens",
        "traffic": "counts what runs, whatever it is",
        "weight_probe": "reads many models at once, so it is not a column of one",
        "live": "memory of tensors, a measure of methods and not of layers",
        "ntk": "kernels between inputs, a matrix for every parameter",
        "sustainability": "compares two inputs, and is trained against",
        "training": "callbacks of a training loop",
        "utilized": "any linear layers, which are not rows",
        "weights": "weights as numbers, however they are stored",
    },
    "nets/families": {
        "base": "the interface",
    },
    "systems": {
        "asking": "sums asked of a model in many ways",
        "base": "the contract, and running one system by id",
        "catalogue": "reads catalogue.toml",
        "controls": "controls that several systems share",
        "curve": "how the loss grows along an order, shared by several systems",
        "mixture": "a small mixture of experts that systems serve",
        "pupil": "the small model of quick sizes",
        "record": "full-size results as files and pages",
        "seeing": "the vision-language model as systems use it",
        "served": "compares what an engine serves with plain passes",
        "sizes": "models of several depths trained on the same bytes",
        "text": "texts that several systems share",
    },
    "transform": {
        "base": "the interface",
        "gptq": "one of the ways in which quantize rounds",
        "gains": "how much each output of a matrix counts",
        "gram": "the statistics that GPTQ reads",
        "closed_form": "the algebra of model editing",
        "descent": "the polish after GPTQ, one of the ways in which quantize rounds",
        "model_editing": "changes what is said about one subject, which no row of the table shows",
        "moments": "statistics of inputs, shared by several",
        "output_error": "estimates for the allocator, before anything is built",
        "rounding": "the arithmetic of quantize",
        "subspace": "the arithmetic of low-rank weights",
        "wishes": "what an edit should write, found by optimisation",
    },
}
"""Files that hold no registered implementation, with the reason, per folder that has a registry."""

MIXED = {
    "data": "its registry names tasks, which are functions of one file among streams and metrics",
}
"""Folders whose registry is not one implementation per file, with the reason."""

LONGEST = 500


def registries() -> dict[str, Registry]:
    """Every registry in the package, by `folder/NAME`."""
    found = {}
    for init in sorted(PACKAGE.rglob("*/__init__.py")):
        folder = init.parent.relative_to(PACKAGE).as_posix()
        module = importlib.import_module(f"layerwise.{folder.replace('/', '.')}")
        for name, value in vars(module).items():
            if isinstance(value, Registry):
                found[f"{folder}/{name}"] = value
    return found


REGISTRIES = registries()
LINES = [(kind, name) for kind, registry in REGISTRIES.items() for name in registry.table]


@pytest.mark.parametrize(("kind", "name"), LINES, ids=[f"{kind}-{name}" for kind, name in LINES])
def test_every_line_resolves(kind: str, name: str) -> None:
    assert REGISTRIES[kind][name] is not None


FOLDERS = sorted({kind.rpartition("/")[0] for kind in REGISTRIES} - set(MIXED))


def implementations(folder: str) -> set[str]:
    """Every file below `folder`, without suffix, except those below a registry of their own."""
    nearest = {
        path: max((f for f in FOLDERS if path.is_relative_to(PACKAGE / f)), key=len)
        for path in (PACKAGE / folder).rglob("*.py")
        if path.stem != "__init__"
    }
    base = PACKAGE / folder
    return {path.relative_to(base).with_suffix("").as_posix() for path, f in nearest.items() if f == folder}


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_has_a_line(folder: str) -> None:
    lines = {place.split(":")[0] for registry in REGISTRIES.values() for place in registry.table.values()}
    places = {name: f"layerwise.{folder}.{name}".replace("/", ".") for name in implementations(folder)}
    unlisted = {name for name, place in places.items() if place not in lines}
    assert unlisted == set(INFRASTRUCTURE.get(folder, {}))


@pytest.mark.parametrize("folder", ["layerwise", "tests", "benchmarks"])
def test_no_file_outgrows_one_idea(folder: str) -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert {str(path): lines for path, lines in lengths.items() if lines > LONGEST} == {}


def test_every_missing_extra_names_a_real_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "MissingExtra":
                given = dict(zip(["package", "extra"], node.args, strict=False))
                given |= {word.arg: word.value for word in node.keywords if word.arg}
                assert ast.literal_eval(given["extra"]) in extras, f"{path}:{node.lineno}"
