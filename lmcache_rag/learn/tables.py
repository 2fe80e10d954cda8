"""Learning a model's codec tables from text: what its KV looks like, and what an error in it costs.

The model reads prompts, answers them by sampling, and is asked how the log-probability of other samples in the answer's
place changes with the K and V of the passages. The second moment of those gradients is the Fisher information.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lmcache_rag_kernels import Rotation, rotate
from torch import Tensor

from lmcache_rag.codec.tables import CodecTables, head_groups, learn_tables
from lmcache_rag.errors import ModelError
from lmcache_rag.prompt import MarkedPrompt

_ANSWER_TOKENS = 12
_SAMPLES = 6
_KEPT_TOKENS = 12_000
"""So many tokens' KV is kept, of all prompts together, for the principal axes."""


def learn(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    rotations: Sequence[Rotation | None],
    prompts: Sequence[MarkedPrompt],
    progress: Callable[[int], Any] | None = None,
    groups: int | None = None,
) -> CodecTables:
    """Tables of the model in `folder`; the same for the same prompts.

    Args:
        rotations: RoPE of each layer.
        prompts: several passages and a question each; a thousand tokens or so each, forty of them.
        progress: gets the number of prompts done.
        groups: into how many a layer's heads are divided, each with a matrix of its own; else what their size asks for.

    Raises:
        ModelError: Hugging Face's version of the model cannot be loaded, or has its KV in another form.
    """
    try:
        with torch.enable_grad():
            return _learn(load_model(folder, dtype, device), device, rotations, prompts, progress, groups)
    except RuntimeError as error:  # of which running out of memory is one
        raise ModelError(
            f"The codec's tables could not be learned ({error}): give the engine less memory, or use --codec q8, which "
            "has none."
        ) from error


def _learn(
    model: Any,
    device: torch.device,
    rotations: Sequence[Rotation | None],
    prompts: Sequence[MarkedPrompt],
    progress: Callable[[int], Any] | None,
    groups: int | None,
) -> CodecTables:
    draw = torch.Generator(device).manual_seed(0)
    stride = max(1, sum(plan.segments[-1].end for plan in prompts) // _KEPT_TOKENS)
    kept: list[Tensor] = []
    fisher: Tensor | None = None
    for number, plan in enumerate(prompts, start=1):
        kv, gradients = _read(model, rotations, plan, draw)
        own = _second_moment(gradients, groups or head_groups(*gradients.shape[3:]))
        # A few prompts would outweigh all others: one of forty has a sixth of the trace of all.
        own *= own.diagonal(dim1=-2, dim2=-1).sum().clamp_min(1e-30).rsqrt()
        fisher = own if fisher is None else fisher.add_(own)
        kept.append(kv[:, :, ::stride].flatten(3).cpu())
        if progress is not None:
            progress(number)
    if fisher is None:
        raise ModelError(
            "There is too little text to learn the codec's tables from, or the model's context is too short for it: "
            "give several thousand words, raise max_model_len, or use --codec q8, which has no tables."
        )
    return learn_tables(torch.cat(kept, dim=2), fisher.cpu())


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Hugging Face's version of a model. Raises `ModelError`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"The codec's tables cannot be learned, since transformers does not load {folder} ({error}): "
            "use --codec q8, which has none."
        ) from error
    return model.requires_grad_(False)


def _read(
    model: Any, rotations: Sequence[Rotation | None], plan: MarkedPrompt, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Position-free KV of the passages `[layers, 2, tokens, kv_heads, head_size]`, and gradients by it
    `[layers, 2, samples * tokens, kv_heads, head_size]`."""
    from transformers import DynamicCache

    start, end = plan.preamble_length, plan.segments[-1].end
    token_ids = torch.tensor([plan.token_ids], device=model.device)
    cache = DynamicCache()
    with torch.no_grad():
        model(token_ids[:, :end], past_key_values=cache, logits_to_keep=1)
        question = _answered(model, token_ids[:, end:], cache, draw)
    cache.crop(end - cache.get_seq_length())  # negative: so many tokens are taken off
    if len(cache.layers) != len(rotations):
        raise ModelError(
            "The codec's tables cannot be learned, since transformers keeps this model's KV in another form: "
            "use --codec q8, which has none."
        )
    leaves = []
    for layer in cache.layers:
        layer.keys = layer.keys.clone().requires_grad_(True)
        layer.values = layer.values.clone().requires_grad_(True)
        leaves += [layer.keys, layer.values]
    logits = model(question, past_key_values=cache, logits_to_keep=_ANSWER_TOKENS).logits[0]
    log_probs = logits.float().log_softmax(-1)
    likelihoods = []
    for _ in range(_SAMPLES):
        sampled = torch.multinomial(log_probs.detach().exp(), 1, generator=draw)
        likelihoods.append(log_probs.gather(1, sampled).sum() / _ANSWER_TOKENS**0.5)
    kv = position_free(leaves, rotations, start, end)
    gradients = [
        position_free(torch.autograd.grad(likelihood, leaves, retain_graph=True), rotations, start, end)
        for likelihood in likelihoods
    ]
    heads = (leaves[0].shape[1], leaves[0].shape[3])
    return kv.unflatten(3, heads), torch.cat(gradients, dim=2).unflatten(3, heads)


def _answered(model: Any, question: Tensor, cache: Any, draw: torch.Generator) -> Tensor:
    """The question's tokens and a sampled answer's behind them, without its last one; leaves both in the cache."""
    read = question
    for _ in range(_ANSWER_TOKENS - 1):
        logits = model(read, past_key_values=cache, logits_to_keep=1).logits[0, -1]
        read = torch.multinomial(logits.float().softmax(-1), 1, generator=draw)[None]
        question = torch.cat([question, read], dim=1)
    return question


def position_free(tensors: Sequence[Tensor], rotations: Sequence[Rotation | None], start: int, end: int) -> Tensor:
    """Layers' K and V in turn, or gradients by them, `[1, kv_heads, tokens, head_size]` each: positions `start` to
    `end` with RoPE taken off K, `[layers, 2, tokens, C]`. A rotation is orthogonal, so a gradient turns like K itself.
    """
    positions = torch.arange(start, end, device=tensors[0].device)
    rows = [tensor.detach()[0, :, start:end].transpose(0, 1).float() for tensor in tensors]
    for layer, rotation in enumerate(rotations):
        if rotation is not None:
            rows[2 * layer] = rotate(rows[2 * layer], rotation, positions, inverse=True)
    return torch.stack(rows).flatten(2).unflatten(0, (len(rotations), 2))


def _second_moment(gradients: Tensor, groups: int) -> Tensor:
    """`[layers, 2, groups, W, W]`: the mean of g g' over the third axis, g being a group's heads."""
    layers, parts, count, heads, size = gradients.shape
    grouped = gradients.reshape(layers, parts, count, groups, heads // groups * size).transpose(2, 3)
    flat = grouped.flatten(0, 2)
    return (torch.bmm(flat.mT, flat) / count).unflatten(0, (layers, parts, groups))
