"""What is reported through LlamaIndex's instrumentation."""

from __future__ import annotations

from typing import Any, Self

from llama_index.core.instrumentation.events import BaseEvent

from lmcache_rag.engine import Completion
from lmcache_rag.request import ReuseReport


class KVReuseEvent(BaseEvent):
    """An answer has ended; its span is the call's that asked for it.

    Attributes:
        model_name: whose it is.
        reuse: what became of the prompt's tokens.
        ttft_s, total_s: seconds from submission to the first and to the last token.
        answer_tokens: how many tokens the answer has.
        finish_reason: `stop`, `length`, `tool_calls` or `abort`.
    """

    model_name: str
    reuse: ReuseReport
    ttft_s: float
    total_s: float
    answer_tokens: int
    finish_reason: str

    @classmethod
    def class_name(cls) -> str:
        return "KVReuseEvent"

    @classmethod
    def of(cls, completion: Completion, model_name: str, span_id: str | None) -> Self:
        """The event of an answer."""
        return cls(
            span_id=span_id,
            model_name=model_name,
            reuse=completion.reuse,
            ttft_s=completion.ttft_s,
            total_s=completion.total_s,
            answer_tokens=completion.answer_tokens,
            finish_reason=completion.finish_reason,
        )


def figures_of(completion: Completion) -> dict[str, Any]:
    """What is known of an answer besides its text, as JSON: the `raw` of LlamaIndex's responses."""
    return {
        "reuse": completion.reuse.model_dump(),
        "ttft_s": completion.ttft_s,
        "total_s": completion.total_s,
        "finish_reason": completion.finish_reason,
        "usage": {
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": completion.answer_tokens,
            "total_tokens": completion.prompt_tokens + completion.answer_tokens,
        },
    }
