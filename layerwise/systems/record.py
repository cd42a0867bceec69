"""Full-size results as files: `python -m layerwise.systems.record ID ...` from a checkout.

Each run writes `layerwise/systems/results/<id>.json`, which `layerwise systems` reads, and the page
`docs/systems/<id>.md` made from it.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import layerwise as lw
from layerwise.io import atomic
from layerwise.systems.base import reproduce
from layerwise.systems.catalogue import catalogue

Record = Mapping[str, Any]
VERDICTS = {True: "holds", False: "does not hold", None: "cannot tell"}
ROOT = Path(__file__).parents[2]


@cache
def results() -> dict[str, Record]:
    """Recorded full-size results by system id; systems without one are absent."""
    folder = files("layerwise.systems").joinpath("results")
    found = {entry.name.removesuffix(".json"): json.loads(entry.read_text(encoding="utf-8"))
             for entry in folder.iterdir() if entry.name.endswith(".json")}
    return {system: found[system] for system in catalogue() if system in found}


def held(record: Record) -> str:
    """How many of the claims hold: `2 of 3`."""
    return f"{sum(check['holds'] is True for check in record['checks'])} of {len(record['checks'])}"


def record(system: str, seed: int = 0) -> Record:
    """Run a system at full size; its checks with command, machine, versions and time."""
    import torch
    import transformers

    start = time.perf_counter()
    checks = [check.to_json() for check in reproduce(system, "full", seed)]
    return {
        "system": system, "size": "full", "seed": seed, "checks": checks,
        "command": f"layerwise reproduce {system} --size full --seed {seed}",
        "seconds": round(time.perf_counter() - start), "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, no accelerator",
        "versions": {"layerwise": lw.__version__, "torch": torch.__version__,
                     "transformers": transformers.__version__, "python": platform.python_version()},
    }


def page(record: Record) -> str:
    """A record as a Markdown page."""
    entry = catalogue()[record["system"]]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [f"# {entry.id}", f"{entry.title} ({entry.year}, arXiv {entry.arxiv}).",
             f"{held(record)} claims hold here. Command: `{record['command']}` ({record['seconds']} s on "
             f"{record['machine']}; {versions}; {record['date']})."]
    for check in record["checks"]:
        lines += [f"## {check['name']}: {VERDICTS[check['holds']]}", f"**Claim.** {check['claim']}",
                  f"**Judged.** {check['why']}.", "**Measured.**", _block(check["measured"]),
                  "**Control.**", _block(check["control"])]
    return "\n\n".join(lines) + "\n"


def index(records: Mapping[str, Record]) -> str:
    """The page that lists every recorded result."""
    lines = ["# Systems: claims beside measurements", "",
             "Each system checks its paper's own claims on small real models, with controls. A claim that does not "
             "hold here is listed as such, with the numbers and the likely reason.", "",
             "| system | paper | claims that hold |", "|---|---|---|"]
    lines += [f"| [{system}]({system}.md) | {catalogue()[system].title} | {held(found)} |"
              for system, found in records.items()]
    planned = [entry.id for entry in catalogue().values() if entry.state == "planned"]
    return "\n".join([*lines, "", f"Planned: {', '.join(planned)}.", ""])


def _block(value: Any) -> str:
    if isinstance(value, Mapping):
        text = "\n".join(f"{name}: {json.dumps(item)}" for name, item in value.items())
    else:
        text = json.dumps(value)
    return f"```text\n{text}\n```"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("systems", nargs="*", metavar="ID", help="ids to run; none writes the pages again")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = ROOT / "layerwise/systems/results"
    for system in arguments.systems:
        print(f"running {system} at full size", file=sys.stderr)
        text = json.dumps(record(system, arguments.seed), indent=1)
        atomic.write_text(folder / f"{system}.json", text + "\n")
    results.cache_clear()
    for system, found in results().items():
        atomic.write_text(ROOT / f"docs/systems/{system}.md", page(found))
    atomic.write_text(ROOT / "docs/systems/index.md", index(results()))


if __name__ == "__main__":
    main()
