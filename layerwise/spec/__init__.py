"""The layer table: `LayerSpec` is one row, `StackSpec` the whole model without its weights.

Rows are frozen and hold plain values, so a model's structure can be printed, compared, edited and
stored as JSON before any tensor is touched. Sizes follow from the table alone: `StackSpec.bytes`
equals what a saved file holds (a test compares the two).
"""

from layerwise.spec.formats import (
    BITS,
    DTYPE_BYTES,
    SCALE_BITS,
    Format,
    Precision,
    TableFormat,
    Tiers,
    parse_table_format,
    tiers_label,
)
from layerwise.spec.mixers import Attention, Mixer, Opaque, Rope, StateSpace
from layerwise.spec.row import FeedForward, LayerSpec, Norm, describe
from layerwise.spec.stack import StackSpec

__all__ = [
    "BITS", "DTYPE_BYTES", "SCALE_BITS", "Attention", "FeedForward", "Format", "LayerSpec", "Mixer", "Norm",
    "Opaque", "Precision", "Rope", "StackSpec", "StateSpace", "TableFormat", "Tiers", "describe",
    "parse_table_format", "tiers_label",
]
