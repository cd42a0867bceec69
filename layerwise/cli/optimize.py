"""`layerwise optimize`: the whole job, from a model and a budget to a smaller model and a report."""

from __future__ import annotations

from typing import Annotated

import typer

from layerwise.cli.options import Data, Fresh, Json, Model, Output, Seed, full, words
from layerwise.cli.screen import Screen


def solvers() -> list[str]:
    """Names of solvers, for completion."""
    from layerwise.allocate.solvers import SOLVERS

    return list(SOLVERS)


Amount = str | None
Bytes = Annotated[Amount, typer.Option("--bytes", help="Stored size, such as 55%, 120MB, or 2x for half.")]
Parameters = Annotated[Amount, typer.Option("--parameters", help="Number of parameters, such as 80% or 100M.")]
Layers = Annotated[Amount, typer.Option("--layers", help="Number of layers, such as 24 or 80%.")]
Cache = Annotated[Amount, typer.Option("--cache", help="KV cache per token, such as 50%, 8kB, or 2x for half.")]
Milliseconds = Annotated[
    Amount,
    typer.Option("--decode", "--milliseconds",
                 help="Time to decode one token here, such as 12ms, 50%, or 2.5x for as many times faster."),
]
Prefill = Annotated[
    Amount,
    typer.Option("--prefill", help="Time to read a prompt of 256 tokens here, such as 900ms, 50%, or 1.5x as fast."),
]
Bits = Annotated[Amount, typer.Option("--bits", help="Stored bits per parameter, such as 5.5.")]
SolverName = Annotated[
    str | None,
    typer.Option("--solver", help="Take this solver's plan, not the best measured one.", autocompletion=solvers),
]
Only = Annotated[
    str,
    typer.Option("--only", help="What a layer may become, separated by commas: bits, 8, 4, 4/128, drop, ..."),
]
Heal = Annotated[
    Amount, typer.Option("--heal", help="Train the result on what the original says, such as 10m, 90s or 200steps.")
]
Trials = Annotated[
    int | None, typer.Option("--trials", help="Blocks of text to try changes on: more predict better and take longer.")
]
Controls = Annotated[bool, typer.Option("--controls", help="Also measure random, shuffled and reversed plans.")]


def optimize(
    model: Model,
    bytes: Bytes = None,
    parameters: Parameters = None,
    layers: Layers = None,
    cache: Cache = None,
    milliseconds: Milliseconds = None,
    prefill: Prefill = None,
    bits: Bits = None,
    solver: SolverName = None,
    only: Only = "",
    controls: Controls = False,
    heal: Heal = None,
    trials: Trials = None,
    data: Data = "default",
    seed: Seed = 0,
    output: Output = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Fit a model into a budget, and verify the result.

    Every layer is measured, what it becomes is decided under the budget and carried out, and the result is
    compared with the original on text that had no part in it. Everything is kept in a run folder, and the
    same command resumes where it was stopped.
    """
    from layerwise.allocate.budget import Budget
    from layerwise.allocate.solvers import SOLVERS
    from layerwise.report import optimize as job
    from layerwise.report.alternatives import check_words
    from layerwise.report.run import Run, default_folder
    from layerwise.train.duration import Duration

    screen = Screen(as_json)
    limits = {
        "bytes": bytes,
        "parameters": parameters,
        "layers": layers,
        "cache": cache,
        "milliseconds": milliseconds,
        "prefill": prefill,
        "bits": bits,
    }
    budget = Budget(**limits)
    alternatives = words(only)
    check_words(alternatives)
    if solver is not None:
        SOLVERS[solver]
    healing = {} if heal is None else {"heal": str(Duration.parse(heal))}
    trials = job.TRIAL if trials is None else trials
    more = {} if trials == job.TRIAL else {"trials": trials}
    arguments = {
        "model": full(model),
        "budget": budget.given(),
        "solver": solver,
        "only": alternatives,
        "controls": controls,
        "data": full(data),
        "seed": seed,
        **healing,
        **more,
    }
    folder = output or default_folder("optimize", model, arguments)
    with Run.open(folder, "optimize", arguments, fresh=fresh) as run, screen.resumable():
        done = job.optimize(
            model, budget, run, solver=solver, only=alternatives, data=data, seed=seed, controls=controls,
            heal=heal, trials=trials, tell=screen.tell,
        )
    screen.show(f"\n{done.report}\n\nplan    {run.path('plan.json')}\nmodel   {done.model}\nreport  {done.page}")
    screen.finish(
        {
            "before": done.report.before.to_json(),
            "after": done.report.after.to_json(),
            "plan": run.path("plan.json"),
            "report": done.page,
            "model": done.model,
            **({"healing": done.report.healing.to_json()} if done.report.healing else {}),
        }
    )
