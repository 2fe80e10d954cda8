"""What a stranger asks about the figures."""

from __future__ import annotations

ASKED = {
    "Which models work?": "Decoders whose attention vLLM computes with its plain attention layer and rotary "
    "embeddings: Llama, Qwen3, Gemma 3 and their like. Each layer is tried at start-up, and what cannot be blended is "
    "refused in words.",
    "How good are the answers?": "As near to full prefill as asked for: the ratio of recomputed tokens follows from a "
    "target for the KL divergence, and at ratio 1 it is full prefill. Small models notice reuse sooner than large "
    "ones.",
    "What does it cost?": "Two prefills of each passage, once, and the bytes under Bytes. `lmcache-rag plan` says what "
    "that is for a model and a corpus, in seconds, gigabytes and money.",
    "What happens when something is missing?": "A passage that is not stored, damaged, or of another model is "
    "computed; a store that fails or is slow costs a request its blend and not its answer. Each answer carries a "
    "report that says so.",
    "When is it of no use?": "For prompts of less than a few hundred tokens, for text that is read once, for stores "
    "slower than computing, and for whole prompts that come again, which vLLM's prefix cache has exactly. The faster "
    "way is taken by itself.",
    "What was not measured?": "GPUs but for times on one H100 (docs/sizing.md), the answers of larger models, real "
    "object storage, more than one machine, and whatever has no section here.",
}
"""Questions and answers; backquotes are code."""
