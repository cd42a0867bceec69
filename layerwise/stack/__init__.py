"""A model opened to its layers: run any slice of them, look at any site, edit and restore."""

from layerwise.stack.base import SITES, Site, Stack, State
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.module import ModuleStack
from layerwise.stack.open import open

__all__ = ["SITES", "DecoderStack", "ModuleStack", "Site", "Stack", "State", "open"]
