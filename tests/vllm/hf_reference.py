"""An oracle for plain reuse, independent of our code: Hugging Face's own model over concatenated chunk caches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache


class HFReference:
    """Next-token distributions of a model whose chunks were each computed behind the preamble, or behind preamble and
    primer but for the first."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.layers = self.model.model.layers
        self.is_gemma = self.model.config.model_type.startswith("gemma3")

    @torch.no_grad()
    def reuse(
        self, preamble: list[int], chunks: list[list[int]], rest: list[int], primer: Sequence[int] = ()
    ) -> torch.Tensor:
        """Log-probabilities `[vocabulary]` behind the prompt, whose chunks' KV is moved to its place unrepaired."""
        pieces = [self._unrotated(preamble)]
        for number, chunk in enumerate(chunks):
            context = [*preamble, *(primer if number else ())]
            whole = self._unrotated([*context, *chunk])
            pieces.append([(key[:, len(context) :], value[:, len(context) :]) for key, value in whole])
        end = len(preamble) + sum(map(len, chunks))
        cache = DynamicCache()
        for index in range(len(self.layers)):
            key = torch.cat([piece[index][0] for piece in pieces], dim=1)
            value = torch.cat([piece[index][1] for piece in pieces], dim=1)
            cache.update(self._rotate(index, key).transpose(1, 2), value.transpose(1, 2), index)
        positions = torch.arange(end, end + len(rest))[None]
        logits = self.model(torch.tensor([rest]), past_key_values=cache, position_ids=positions).logits
        return logits[0, -1].log_softmax(-1)

    def _unrotated(self, token_ids: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each layer's K before RoPE (behind its norm, where it has one) and V: `[1, tokens, kv_heads, head_size]`."""
        found: dict[tuple[int, str], torch.Tensor] = {}
        hooks = []
        for index, layer in enumerate(self.layers):
            attention = layer.self_attn
            size = attention.head_dim
            for name, module in (("k", getattr(attention, "k_norm", attention.k_proj)), ("v", attention.v_proj)):

                def keep(
                    _module: object, _inputs: object, output: torch.Tensor, at: tuple[int, str] = (index, name)
                ) -> None:
                    found[at] = output

                hooks.append(module.register_forward_hook(keep))
        self.model(torch.tensor([token_ids]))
        for hook in hooks:
            hook.remove()
        return [
            (
                self._by_token(found[index, "k"], len(token_ids), size),
                self._by_token(found[index, "v"], len(token_ids), size),
            )
            for index in range(len(self.layers))
        ]

    def _by_token(self, states: torch.Tensor, tokens: int, size: int) -> torch.Tensor:
        if states.dim() == 4 and self.is_gemma:  # its norm is over [1, kv_heads, tokens, head_size]
            states = states.transpose(1, 2)
        return states.reshape(1, tokens, -1, size)

    def _rotate(self, index: int, key: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(key.shape[1])[None]
        kinds = getattr(self.model.config, "layer_types", None)
        rotary = self.model.model.rotary_emb
        if self.is_gemma:
            cos, sin = rotary(key, positions, kinds[index])
        else:
            cos, sin = rotary(key, positions)
        cos, sin = cos[:, :, None], sin[:, :, None]
        first, second = key.chunk(2, dim=-1)
        return key * cos + torch.cat([-second, first], dim=-1) * sin
