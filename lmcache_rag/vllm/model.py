"""The model that vLLM has loaded, run eagerly on any tokens at any positions with our own attention.

Every decoder that uses vLLM's `Attention` layer looks that layer up by name in the forward context. A context of our
own in which each name stands for a proxy therefore routes q, k (RoPE and QK-norm applied) and v of every layer to a
`Pass`, without any code per architecture, and keeps vLLM's own cache write from happening.
"""

from __future__ import annotations

from typing import Any

import torch
from lmcache_rag_kernels import Rotation, rotate
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import ForwardContext, override_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from lmcache_rag.blend.passes import Pass
from lmcache_rag.blend.workspace import LayerSpec, Workspace, on_device
from lmcache_rag.chunk_kv import KVShape
from lmcache_rag.errors import ModelError

_CHECK_TOKEN = 5
_TOLERANCE = {torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


class BoundModel:
    """A loaded model and its attention layers.

    Attributes:
        layers: vLLM's own, in the model's order.
        asleep: its weights and the paged cache are not there for now.

    Raises:
        ModelError: the model has layers whose KV cannot be blended; says which and why.
    """

    def __init__(self, model: nn.Module, vllm_config: VllmConfig) -> None:
        self._model = model
        self._context: dict[str, Any] = vllm_config.compilation_config.static_forward_context
        self._names = [name for name, layer in self._context.items() if isinstance(layer, AttentionLayerBase)]
        if not self._names:
            raise ModelError("The model has no attention layers, so there is no KV to blend.")
        self.layers: list[Any] = [self._context[name] for name in self._names]
        for name, layer in zip(self._names, self.layers, strict=True):
            reason = _refusal(layer)
            if reason:
                raise ModelError(f"This model's KV cannot be blended: {name} {reason}. Run it without lmcache-rag.")
        first = self.layers[0]
        if any((layer.num_kv_heads, layer.head_size) != (first.num_kv_heads, first.head_size) for layer in self.layers):
            raise ModelError("This model's KV cannot be blended: its layers have KV of different shapes.")
        self.asleep = False
        self.device = next(model.parameters()).device
        self.shape = KVShape(len(self.layers), first.num_kv_heads, first.head_size, vllm_config.model_config.dtype)
        self._max_model_len: int = vllm_config.model_config.max_model_len
        self.specs = self._layer_specs()

    def workspace(self, max_tokens: int) -> Workspace:
        """Room for one blend of a prompt of up to `max_tokens`."""
        return Workspace(
            self.specs,
            kv_heads=self.shape.kv_heads,
            head_size=self.shape.head_size,
            max_tokens=max_tokens,
            dtype=self.shape.dtype,
            device=self.device,
        )

    @torch.inference_mode()
    def __call__(self, token_ids: Tensor, nested: Pass) -> None:
        """Run the tokens at `nested.positions`; see `blend.passes.PassRunner`."""
        proxies = {
            name: _LayerProxy(layer, index, nested)
            for index, (name, layer) in enumerate(zip(self._names, self.layers, strict=True))
        }
        context = ForwardContext(
            no_compile_layers={**self._context, **proxies},
            attn_metadata=dict.fromkeys(self._names),  # type: ignore[arg-type]
            slot_mapping={},
            skip_compiled=True,
        )
        try:
            with override_forward_context(context):
                self._model(
                    input_ids=on_device(token_ids, self.device),
                    positions=nested.positions,
                    intermediate_tensors=None,
                    inputs_embeds=None,
                )
        except _PassEndedError:
            return

    def _layer_specs(self) -> list[LayerSpec]:
        """What each layer's attention needs; each layer's rotation is checked against the model itself."""
        rotations: dict[int, Rotation] = {}
        specs = []
        for layer in self.layers:
            rotary = _rotary_of(self._model, layer)
            if rotary is not None and id(rotary) not in rotations:
                cache = rotary.cos_sin_cache.to(self.device)
                rotations[id(rotary)] = Rotation.from_cache(cache, interleaved=not rotary.is_neox_style)
                if cache.shape[0] < self._max_model_len:
                    raise ModelError(
                        f"The model's rotary embedding knows {cache.shape[0]} positions, fewer than its "
                        f"{self._max_model_len}: set max_model_len to {cache.shape[0]}."
                    )
            rotation = None if rotary is None else rotations[id(rotary)]
            specs.append(LayerSpec(scale=layer.impl.scale, window=layer.sliding_window, rotation=rotation))
        return self._checked(specs)

    def _checked(self, specs: list[LayerSpec]) -> list[LayerSpec]:
        """Compare every layer's rotation with keys that the model computes.

        A token that stands alone attends to itself only, so its K before RoPE is the same at every position: K at
        position p must be K at position 0 rotated to p. A layer whose K does not depend on p has no RoPE.
        """
        origin = self._lone_keys(0)
        positions = sorted({1, 7, self._max_model_len // 2, self._max_model_len - 1})
        found = {position: self._lone_keys(position) for position in positions}
        checked = []
        for index, spec in enumerate(specs):
            if all(_close(keys[index], origin[index]) for keys in found.values()):
                checked.append(LayerSpec(spec.scale, spec.window, None))
                continue
            for position, keys in found.items():
                if spec.rotation is None or not _close(
                    keys[index], rotate(origin[index], spec.rotation, torch.tensor([position], device=self.device))
                ):
                    raise ModelError(
                        f"This model's KV cannot be blended: the rotary embedding of layer {index} does not move keys "
                        f"from position 0 to {position} as computed. Run it without lmcache-rag."
                    )
            checked.append(spec)
        return checked

    def _lone_keys(self, position: int) -> list[Tensor]:
        """Each layer's key `[1, kv_heads, head_size]` of one token that stands alone at `position`."""
        probe = _LonePass(torch.tensor([position], device=self.device))
        self(torch.tensor([_CHECK_TOKEN]), probe)
        if sorted(probe.keys) != list(range(len(self.layers))):
            raise ModelError(
                "This model's KV cannot be blended: its attention layers do not run once each. "
                "Run it without lmcache-rag."
            )
        return [probe.keys[index] for index in range(len(self.layers))]


class _LonePass(Pass):
    """A pass of one token that sees only itself."""

    def __init__(self, positions: Tensor) -> None:
        self.positions = positions
        self.keys: dict[int, Tensor] = {}

    def attention(self, layer: int, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> bool:
        self.keys[layer] = key.clone()
        out.copy_(value.repeat_interleave(query.shape[1] // value.shape[1], dim=1))
        return True


class _LayerProxy:
    """Stands for an attention layer in the forward context: it is the layer, and its own implementation."""

    def __init__(self, layer: Any, index: int, nested: Pass) -> None:
        self._layer = layer
        self._index = index
        self._nested = nested
        self.impl = self
        self.kv_cache = layer.kv_cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Any,
        attn_metadata: Any,
        output: Tensor,
        **_: Any,
    ) -> Tensor:
        if not self._nested.attention(self._index, query, key, value, output):
            raise _PassEndedError
        return output


class _PassEndedError(Exception):
    """Leaves the model in the middle of a pass that needs no further layer."""


def _refusal(layer: Any) -> str:
    """Why a layer's KV cannot be blended, or nothing."""
    if type(layer) is not Attention:
        return f"is a {type(layer).__name__}, and only plain decoder attention is supported"
    if layer.kv_sharing_target_layer_name is not None:
        return "shares the KV of another layer"
    if layer.head_size_v != layer.head_size:
        return "has K and V of different sizes"
    if layer.has_sink:
        return "has attention sinks"
    needed = ("alibi_slopes", "logits_soft_cap", "scale", "do_kv_cache_update")
    missing = [name for name in needed if not hasattr(layer.impl, name)]
    if missing:
        return f"has an attention backend, {type(layer.impl).__name__}, without {', '.join(missing)}"
    if layer.impl.alibi_slopes is not None:
        return "uses ALiBi"
    if layer.impl.logits_soft_cap:
        return "caps its attention logits"
    return ""


def _rotary_of(model: nn.Module, layer: nn.Module) -> Any:
    """The rotary embedding beside an attention layer; None where its parent has none."""
    parent = next((module for module in model.modules() if any(child is layer for child in module.children())), None)
    if parent is None:
        return None
    return next((child for child in parent.children() if hasattr(child, "cos_sin_cache")), None)


def _close(found: Tensor, expected: Tensor) -> bool:
    error = (found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-12)
    return float(error) < _TOLERANCE.get(found.dtype, 1e-2)
