"""Answers that are given beforehand, for teacher forcing: the model's distributions behind a known answer's tokens.

vLLM reports log-probabilities as they are before logits processors, so that forcing a token does not change them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor, RequestLogitsProcessor

FORCED_KEY = "lmcache_rag_forced_token_ids"
"""Where a request's `SamplingParams.extra_args` carry the answer's token ids."""


class ForcedTokens(AdapterLogitsProcessor):
    """Leaves the sampler one choice for each token of the given answer."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> RequestLogitsProcessor | None:
        forced: list[int] = (params.extra_args or {}).get(FORCED_KEY, [])
        if not forced:
            return None

        def force(output_ids: list[int], logits: Tensor) -> Tensor:
            if len(output_ids) >= len(forced):
                return logits
            only = torch.full_like(logits, -torch.inf)
            only[forced[len(output_ids)]] = 0.0
            return only

        return force
