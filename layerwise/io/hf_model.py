"""A decoder with any layer table as a transformers model: forward, loss, generate, save.

Shapes: B batch, T new tokens, S cached plus new tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from layerwise.io.hf_config import LayerwiseConfig
from layerwise.io.save import save
from layerwise.nets.decoder import Decoder
from layerwise.nets.flow import Flow, StateCache
from layerwise.spec import StackSpec


class LayerwiseForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """What `AutoModelForCausalLM.from_pretrained` gives for a layer-table folder."""

    config_class = LayerwiseConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"

    def __init__(self, config: LayerwiseConfig) -> None:
        super().__init__(config)
        spec = StackSpec.from_json(config.layer_table or {})
        dtype: Any = str(torch.get_default_dtype()).removeprefix("torch.")  # the one that was asked for
        self.model = Decoder(replace(spec, dtype=dtype))
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, past_key_values: Cache | None = None,
                labels: Tensor | None = None, use_cache: bool | None = None,
                logits_to_keep: int = 0, **_: Any) -> CausalLMOutputWithPast:
        """Logits [B, T, V] of `input_ids` [B, T]; with `labels`, the mean loss of predicting the next token.

        `attention_mask` [B, S] is zero at padding. `logits_to_keep` > 0 gives only the last logits.
        """
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        masked = 0 if attention_mask is None else attention_mask.shape[1]
        past = max(_length(past_key_values), masked - input_ids.shape[1])  # a state does not say how much it has read
        valid_BS = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        if position_ids is None:
            position_ids = _positions(input_ids, valid_BS, past)
        caches = None if past_key_values is None else _Caches(past_key_values)
        flow = Flow(position_ids, valid_BS, caches, past, self.dtype)
        x_BTC = self.model.embed(input_ids, flow)
        for layer, block in enumerate(self.model.layers):
            x_BTC = block(x_BTC, flow, layer)
        logits_BTV = self.model.logits(x_BTC[:, -logits_to_keep:])
        loss = None if labels is None else _loss(logits_BTV, labels)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, past_key_values=past_key_values)

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:  # type: ignore[override]
        """Write the folder as layerwise writes it: one its family's own class opens where the rows allow."""
        with TemporaryDirectory() as assets:
            self.generation_config.save_pretrained(assets)
            save(save_directory, self.model.spec, self.model.state_dict().items(), assets=Path(assets))

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.embedding  # type: ignore[no-any-return]


class _LayerCache:
    """One layer's keys and values inside a transformers cache."""

    def __init__(self, cache: Cache, layer: int) -> None:
        self.cache, self.layer = cache, layer

    def append(self, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.cache.update(k_BHTD, v_BHTD, self.layer)
        return k, v


class _StateCache:
    """What one recurrent layer keeps, inside a transformers cache."""

    def __init__(self, cache: Cache, layer: int) -> None:
        while len(cache.layers) <= layer:
            cache.layers.append(DynamicLayer())  # type: ignore[no-untyped-call]
        if not isinstance(cache.layers[layer], LinearAttentionLayer):
            cache.layers[layer] = LinearAttentionLayer()
        self.held: Any = cache.layers[layer]
        self.length = 0

    @property
    def kept(self) -> tuple[Tensor, ...] | None:
        """The two states, in whichever order beam search has put their rows."""
        if not self.held.has_previous_state[0]:
            return None
        return self.held.conv_states[0], self.held.recurrent_states[0]

    @kept.setter
    def kept(self, new: tuple[Tensor, ...]) -> None:
        self.held.conv_states[0], self.held.recurrent_states[0] = new
        self.held.device = new[0].device
        for known in (self.held.is_conv_states_initialized, self.held.is_recurrent_states_initialized,
                      self.held.has_previous_state):
            known[0] = True


class _Caches(dict[int, Any]):
    """Layer to its cache, made when the layer asks."""

    def __init__(self, cache: Cache) -> None:
        super().__init__()
        self.cache = cache

    def setdefault(self, layer: int, default: Any = None) -> Any:
        if layer not in self:
            self[layer] = (_StateCache if isinstance(default, StateCache) else _LayerCache)(self.cache, layer)
        return self[layer]


def _length(cache: Cache | None) -> int:
    """Tokens in the cache: layers without attention hold none, so the longest layer counts."""
    layers = [] if cache is None else [layer for layer in cache.layers if not isinstance(layer, LinearAttentionLayer)]
    return max((int(layer.get_seq_length()) for layer in layers), default=0)  # type: ignore[union-attr]


def _positions(tokens_BT: Tensor, valid_BS: Tensor | None, past: int) -> Tensor:
    batch, new = tokens_BT.shape
    if valid_BS is None:
        return torch.arange(past, past + new, device=tokens_BT.device).expand(batch, new)
    return (valid_BS.long().cumsum(-1) - 1).clamp(min=0)[:, past:]


def _loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean cross entropy over labels that are not -100."""
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), labels_BT[:, 1:].flatten())
