"""Solvers: one rule for picking one alternative per layer, per file; the last four are controls."""

from layerwise.registry import Registry

SOLVERS = Registry("solver", {
    "milp": "layerwise.allocate.solvers.milp:Milp",
    "dynamic-programming": "layerwise.allocate.solvers.dynamic_programming:DynamicProgramming",
    "greedy": "layerwise.allocate.solvers.greedy:Greedy",
    "evolution": "layerwise.allocate.solvers.evolution:Evolution",
    "rank-and-cut": "layerwise.allocate.solvers.rank_and_cut:RankAndCut",
    "proportional": "layerwise.allocate.solvers.proportional:Proportional",
    "uniform": "layerwise.allocate.solvers.uniform:Uniform",
    "random": "layerwise.allocate.solvers.random_fill:RandomFill",
    "shuffled": "layerwise.allocate.solvers.shuffled:Shuffled",
    "reversed": "layerwise.allocate.solvers.reversed_losses:ReversedLosses",
})
