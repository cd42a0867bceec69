"""The executable contract of a system."""

from __future__ import annotations

import json

from layerwise.systems.base import Check, Size, reproduce


def check_system(system: str, size: Size = "quick", seed: int = 0) -> list[Check]:
    """Run a system and assert its contract: named checks, plain values, a reason for every verdict, a control.

    Which claims hold is a finding, not part of the contract. Returns the checks.
    """
    checks = reproduce(system, size, seed)
    assert checks, f"{system} checks nothing"
    names = [check.name for check in checks]
    assert len(set(names)) == len(names), f"{system} repeats a check name: {names}"
    for check in checks:
        where = f"{system}: {check.name}"
        assert check.claim and check.why, f"{where} needs a claim and a reason"
        assert check.holds in (True, False, None), f"{where} must hold, not hold, or not tell"
        assert check.control is not None or check.holds is None, (
            f"{where} has no control that could have failed"
        )
        json.dumps(check.to_json(), allow_nan=False)
    return checks
