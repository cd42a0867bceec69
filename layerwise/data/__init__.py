"""Text and image streams, calibration and verification splits, tasks, metrics and their uncertainty."""

from layerwise.data.batch import Batch, check_tokens, pad
from layerwise.data.bootstrap import Interval, interval, paired_interval
from layerwise.data.images import ImageBatch, ImageData
from layerwise.data.metrics import (
    Losses,
    agreement,
    block_losses,
    hidden_losses,
    kl_divergence,
    perplexity,
    token_losses,
)
from layerwise.data.module import Batches, Call, calls
from layerwise.data.split import Split
from layerwise.data.tasks import Accuracy, ChoiceItem, MultipleChoice, accuracy, loss_scorer, scorer
from layerwise.data.text import Source, TextData, Tokenizer, text_blocks
from layerwise.registry import Registry

TASKS = Registry(
    "task",
    {
        "commonsense-qa": "layerwise.data.questions:commonsense_qa",
        "next-sentence": "layerwise.data.questions:next_sentence",
        "piqa": "layerwise.data.questions:piqa",
    },
)

__all__ = [
    "TASKS",
    "Accuracy",
    "Batch",
    "Batches",
    "Call",
    "ChoiceItem",
    "ImageBatch",
    "ImageData",
    "Interval",
    "Losses",
    "MultipleChoice",
    "Source",
    "Split",
    "TextData",
    "Tokenizer",
    "accuracy",
    "agreement",
    "block_losses",
    "calls",
    "check_tokens",
    "hidden_losses",
    "interval",
    "kl_divergence",
    "loss_scorer",
    "pad",
    "paired_interval",
    "perplexity",
    "scorer",
    "text_blocks",
    "token_losses",
]
