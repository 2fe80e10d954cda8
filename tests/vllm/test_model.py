"""Which models can be blended: the others are refused in words, and never blended wrongly."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.model_executor.layers.attention import Attention

from lmcache_rag.engine import LocalEngine
from lmcache_rag.errors import ModelError
from lmcache_rag.vllm.model import _refusal
from lmcache_rag.vllm.worker import bound_model

PLAIN = {"alibi_slopes": None, "logits_soft_cap": 0.0, "scale": 1.0, "do_kv_cache_update": None}


def layer(impl: dict[str, Any], **fields: Any) -> Any:
    made = Attention.__new__(Attention)
    usual = {"kv_sharing_target_layer_name": None, "head_size": 64, "head_size_v": 64, "has_sink": False}
    vars(made).update({**usual, **fields, "impl": SimpleNamespace(**impl)})
    return made


@pytest.mark.parametrize(
    ("impl", "fields", "reason"),
    [
        (PLAIN, {}, ""),
        (PLAIN, {"kv_sharing_target_layer_name": "layers.3"}, "shares the KV of another layer"),
        (PLAIN, {"head_size_v": 128}, "K and V of different sizes"),
        (PLAIN, {"has_sink": True}, "attention sinks"),
        ({**PLAIN, "alibi_slopes": [0.5]}, {}, "ALiBi"),
        ({**PLAIN, "logits_soft_cap": 50.0}, {}, "caps its attention logits"),
        ({}, {}, "an attention backend, SimpleNamespace, without alibi_slopes"),
    ],
)
def test_layers(impl: dict[str, Any], fields: dict[str, Any], reason: str) -> None:
    found = _refusal(layer(impl, **fields))
    assert reason in found and bool(found) == bool(reason)


def test_other_kinds_of_attention() -> None:
    class MLAAttention:
        pass

    assert "is a MLAAttention" in _refusal(MLAAttention())


def test_a_rotation_that_does_not_move_keys_as_the_model_does(llama: LocalEngine) -> None:
    model = bound_model()
    wrong = [
        spec if number else replace(spec, rotation=replace(spec.rotation, interleaved=True))  # type: ignore[type-var]
        for number, spec in enumerate(model.specs)
    ]
    assert model._checked(model.specs) == model.specs
    with pytest.raises(ModelError, match="rotary embedding of layer 0 does not move keys"):
        model._checked(wrong)
