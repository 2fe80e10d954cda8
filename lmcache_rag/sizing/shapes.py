"""The figures of a model that its costs depend on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcache_rag.errors import ModelError


@dataclass(frozen=True)
class ModelShape:
    """A decoder with grouped-query attention and gated MLPs.

    Attributes:
        hidden, intermediate: widths of the residual stream and of the MLPs.
        vocabulary: of the output layer, which weighs in memory but not in prefill.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int

    @property
    def weights(self) -> int:
        """Parameters that every token of a prompt is multiplied with."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def attention_flops(self) -> int:
        """Of one query with one key, in all layers."""
        return 4 * self.layers * self.heads * self.head_dim

    @property
    def kv_bytes(self) -> int:
        """K and V of one token in all layers, in 16 bits."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    def flops(self, tokens: int) -> tuple[float, float]:
        """What prefill of a prompt takes: in multiplications with weights, and in causal attention."""
        return 2.0 * self.weights * tokens, self.attention_flops * tokens**2 / 2


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49_152),
        ModelShape("qwen3-0.6b", 28, 1024, 16, 8, 128, 3072, 151_936),
        ModelShape("llama-3.2-1b", 16, 2048, 32, 8, 64, 8192, 128_256),
        ModelShape("qwen3-4b", 36, 2560, 32, 8, 128, 9728, 151_936),
        ModelShape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14_336, 128_256),
        ModelShape("qwen3-14b", 40, 5120, 40, 8, 128, 17_408, 151_936),
        ModelShape("llama-3.3-70b", 80, 8192, 64, 8, 128, 28_672, 128_256),
    )
}
"""As their `config.json` has them."""


def model_shape(model: str) -> ModelShape:
    """Of a model that is known by name, or of a folder with a `config.json`.

    Raises:
        ModelError: it is neither, or the configuration lacks a figure.
    """
    known = MODELS.get(model.lower())
    if known is not None:
        return known
    path = Path(model).expanduser() / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError):
        names = ", ".join(MODELS)
        raise ModelError(f"{model!r} is no folder with a config.json, and none of {names}.") from None
    return _shape_of(path, config.get("text_config", config))


def _shape_of(path: Path, config: dict[str, Any]) -> ModelShape:
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        return ModelShape(
            name=path.parent.name,
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            intermediate=int(config["intermediate_size"]),
            vocabulary=int(config["vocab_size"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} has no {error}: only dense decoders can be estimated.") from None
