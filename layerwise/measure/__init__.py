"""Measuring what each layer does, as columns beside the table: `layerwise.measure(stack, data, instruments)`.

One instrument per file. Forward instruments share one pass over the data, gradient instruments one backward,
interventions one walk along cached prefixes; the rest read a layer's row and weights.
"""

from layerwise._callable import make_callable
from layerwise.registry import Registry

INSTRUMENTS = Registry("instrument", {
    "angular-distance": "layerwise.measure.angular_distance:AngularDistance",
    "attention-budget": "layerwise.measure.attention_budget:AttentionBudget",
    "block-influence": "layerwise.measure.block_influence:BlockInfluence",
    "contribution-cosine": "layerwise.measure.contribution_cosine:ContributionCosine",
    "cost": "layerwise.measure.cost:Cost",
    "criticality": "layerwise.measure.criticality:Criticality",
    "energy": "layerwise.measure.layer_energy:LayerEnergy",
    "gradient-times-activation": "layerwise.measure.gradient_times_activation:GradientTimesActivation",
    "leave-one-out": "layerwise.measure.leave_one_out:LeaveOneOut",
    "lim": "layerwise.measure.lim:LayerInputModification",
    "logit-lens-kl": "layerwise.measure.logit_lens_kl:LogitLensKL",
    "logit-lens-overlap": "layerwise.measure.logit_lens_overlap:LogitLensOverlap",
    "manifold": "layerwise.measure.manifold:Manifold",
    "output-error": "layerwise.measure.output_error:OutputError",
    "quantization-sensitivity": "layerwise.measure.quantization_sensitivity:QuantizationSensitivity",
    "relative-contribution": "layerwise.measure.relative_contribution:RelativeContribution",
    "response": "layerwise.measure.response:Response",
    "roofline": "layerwise.measure.roofline:Roofline",
    "skip-effect": "layerwise.measure.skip_effect:SkipEffect",
    "taylor": "layerwise.measure.taylor:Taylor",
    "tuned-lens": "layerwise.measure.tuned_lens:TunedLens",
    "utilized-rank": "layerwise.measure.utilized_rank:UtilizedRank",
    "weight-l1": "layerwise.measure.weight_magnitude:WeightL1",
    "weight-l2": "layerwise.measure.weight_magnitude:WeightL2",
    "zd": "layerwise.measure.zd:ZScoreDistribution",
})

make_callable(__name__, "layerwise.measure.engine:measure")
