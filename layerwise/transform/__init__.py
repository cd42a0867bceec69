"""Transforms: one edit of a row, and the weights that agree with it, per file."""

from layerwise.registry import Registry

TRANSFORMS = Registry("transform", {
    "cache-precision": "layerwise.transform.cache_precision:CachePrecision",
    "drop": "layerwise.transform.drop:Drop",
    "learn-rotation": "layerwise.transform.learn_rotation:LearnRotation",
    "low-rank": "layerwise.transform.low_rank:LowRank",
    "narrow": "layerwise.transform.narrow:Narrow",
    "quantize": "layerwise.transform.quantize:Quantize",
    "rotate-values": "layerwise.transform.rotate:RotateValues",
    "scale-inputs": "layerwise.transform.scale_inputs:ScaleInputs",
    "share-kv": "layerwise.transform.share_kv:ShareKV",
})
