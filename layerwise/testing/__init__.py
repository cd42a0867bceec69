"""Executable contracts: what every instrument, transform, solver and system promises, as functions that assert it.

Run them over your own additions; layerwise runs them over everything it registers.
"""

from layerwise.testing.instruments import check_instrument
from layerwise.testing.solvers import check_solver
from layerwise.testing.stacks import random_stack
from layerwise.testing.systems import check_system
from layerwise.testing.transforms import check_transform

__all__ = ["check_instrument", "check_solver", "check_system", "check_transform", "random_stack"]
