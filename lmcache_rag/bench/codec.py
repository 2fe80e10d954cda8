"""What each codec makes of real KV: bytes, speed, and how far its errors move what the model says.

For the latter nothing is blended. A question's passages are read in place by full prefill; their KV is coded and
decoded in pieces of so many tokens; and the distributions of the gold answer's tokens behind it are compared with those
behind the KV as it was.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lmcache_rag_kernels import Rotation, Rows, rotate
from torch import Tensor

from lmcache_rag.bench.questions import Question
from lmcache_rag.bench.scores import kl_divergence, mean_interval
from lmcache_rag.chunk_kv import NO_CONTEXT, ChunkKV, KVScope
from lmcache_rag.codec import CODECS, Codec, ObjectIndex, open_index, unpack, unpack_range
from lmcache_rag.codec.tables import CodecTables
from lmcache_rag.errors import ModelError, PromptError
from lmcache_rag.learn.tables import load_model, position_free
from lmcache_rag.library.coding import coded
from lmcache_rag.prompt import MarkedPrompt, PromptFormat, Tokenizer
from lmcache_rag.request import DEFAULT_NAMESPACE

Row = dict[str, Any]

_TIMED_QUESTIONS = 8
"""Bytes and speed are measured on the passages of so many questions, one after another."""

_REPEAT = 3
"""Of each piece the best of so many counts, and over the pieces the median."""

_FLOAT16_BYTES = 2
_HALVES = 2
_TWO_THREADS = 2


@dataclass(frozen=True)
class _Asked:
    """A question with the KV of its passages, position-free `[layers, 2, tokens, heads, size]`, in a cache of the whole
    context."""

    plan: MarkedPrompt
    answer: tuple[int, ...]
    cache: Any
    kv: Tensor


class CodecBench:
    """Measures on one model.

    Args:
        rotations: RoPE of each layer.
        codecs: of `codec.CODECS`.
        sizes: tokens per piece.
        threads: for coding, but where it says two; the model always has all.
    """

    def __init__(
        self,
        folder: Path,
        rotations: Sequence[Rotation | None],
        tables: CodecTables,
        *,
        codecs: Sequence[str],
        sizes: Sequence[int],
        threads: int,
    ) -> None:
        self._model = load_model(folder, torch.float32, torch.device("cpu"))
        self._rotations = rotations
        self._tables = tables
        self._codecs = {name: CODECS[name].make(len(rotations), tables) for name in codecs}
        self._sizes = sizes
        self._threads = threads

    @torch.no_grad()
    def rows(
        self,
        tokenizer: Tokenizer,
        prompt: PromptFormat,
        questions: Sequence[Question],
        progress: Callable[[str], Any],
    ) -> list[Row]:
        """One row for each codec and piece size.

        Raises:
            PromptError: a piece is longer than the passages that speed is measured on.
        """
        plans = [prompt.plan(tokenizer, question.passages, question.text) for question in questions]
        tokens = sum(plan.segments[-1].end - plan.preamble_length for plan in plans[:_TIMED_QUESTIONS])
        if tokens < max(self._sizes):
            raise PromptError(f"chunk-tokens: the first questions' passages have {tokens} tokens, choose less.")
        ways = [(name, size) for size in self._sizes for name in self._codecs]
        kl: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
        top1: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
        sample: list[Tensor] = []
        for number, (plan, question) in enumerate(zip(plans, questions, strict=True), start=1):
            progress(f"question {number} of {len(questions)}")
            asked = self._ask(plan, tokenizer.encode(question.answer, add_special_tokens=False))
            expected = self._answer(asked, asked.kv)
            if number <= _TIMED_QUESTIONS:
                sample.append(asked.kv)
            for name, size in ways:
                decoded = [_there_and_back(self._codecs[name], piece) for piece in asked.kv.split(size, dim=2)]
                found = self._answer(asked, torch.cat(decoded, dim=2))
                kl[name, size].append(float(kl_divergence(expected, found).mean()))
                top1[name, size].append(float((expected.argmax(1) == found.argmax(1)).mean()))
        kv = torch.cat(sample, dim=2)
        rows = []
        for name, size in ways:
            progress(f"speed of {name} at {size} tokens")
            low, high = mean_interval(kl[name, size])
            rows.append(
                {
                    "codec": name,
                    "chunk_tokens": size,
                    **self._coded(name, kv[:, :, : kv.shape[2] // size * size].split(size, 2)),
                    "kl_mean": round(statistics.mean(kl[name, size]), 4),
                    "kl_ci95": [round(low, 4), round(high, 4)],
                    "top1": round(statistics.mean(top1[name, size]), 3),
                    "tables_bytes": len(self._tables.to_bytes()) if CODECS[name].learned else 0,
                    "threads": self._threads,
                    "n": len(questions),
                }
            )
        return rows

    def _ask(self, plan: MarkedPrompt, answer: Sequence[int]) -> _Asked:
        from transformers import DynamicCache

        start, end = plan.preamble_length, plan.segments[-1].end
        cache = DynamicCache()
        self._model(torch.tensor([plan.token_ids[:end]]), past_key_values=cache, logits_to_keep=1)
        if len(cache.layers) != len(self._rotations):
            raise ModelError("Transformers keeps this model's KV in another form: its codec cannot be measured.")
        tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        heads, size = tensors[0].shape[1], tensors[0].shape[3]
        kv = position_free(tensors, self._rotations, start, end).unflatten(-1, (heads, size))
        return _Asked(plan, tuple(answer), cache, kv)

    def _answer(self, asked: _Asked, kv: Tensor) -> np.ndarray:
        """Log-probabilities of the gold answer's tokens behind this KV of the passages."""
        start, end = asked.plan.preamble_length, asked.plan.segments[-1].end
        positions = torch.arange(start, end)
        for layer, rotation, (key, value) in zip(asked.cache.layers, self._rotations, kv, strict=True):
            rotated = key if rotation is None else rotate(key, rotation, positions)
            layer.keys[0, :, start:end] = rotated.transpose(0, 1)
            layer.values[0, :, start:end] = value.transpose(0, 1)
        read = torch.tensor([[*asked.plan.token_ids[end:], *asked.answer[:-1]]])
        logits = self._model(read, past_key_values=asked.cache, logits_to_keep=len(asked.answer)).logits[0]
        asked.cache.crop(end - asked.cache.get_seq_length())
        return logits.double().log_softmax(-1).numpy()

    def _coded(self, name: str, pieces: Sequence[Tensor]) -> Row:
        """Bytes of whole objects, MB of float16 KV per second, what the first half of a piece takes of the time for all
        of it, and relative errors."""
        codec = self._codecs[name]
        plain = _FLOAT16_BYTES * pieces[0].numel()
        tables = self._tables.digest if CODECS[name].learned else ""
        times: list[_Times] = []
        coded_bytes = 0
        wrong, whole = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        before = torch.get_num_threads()
        try:
            for piece in pieces:
                data, own = self._timed(codec, name, tables, piece)
                times.append(own)
                coded_bytes += len(data)
                error = _there_and_back(codec, piece) - piece
                wrong += error.double().square().sum((0, 2, 3, 4))
                whole += piece.double().square().sum((0, 2, 3, 4))
        finally:
            torch.set_num_threads(before)
        encode_s, decode_s, two_threads_s, half_s = (statistics.median(way) for way in zip(*times, strict=True))
        k, v = (wrong / whole).sqrt().tolist()
        return {
            "bytes": round(coded_bytes / len(pieces)),
            "ratio_vs_fp16": round(plain * len(pieces) / coded_bytes, 2),
            "encode_mb_s": round(plain / encode_s / 1e6),
            "decode_mb_s": round(plain / decode_s / 1e6),
            "decode_2_threads_mb_s": round(plain / two_threads_s / 1e6),
            "half_of_time": round(half_s / decode_s, 2),
            "rel_l2_k": round(k, 4),
            "rel_l2_v": round(v, 4),
        }

    def _timed(self, codec: Codec, name: str, tables: str, piece: Tensor) -> tuple[bytearray, _Times]:
        """A piece's object, and the best times."""
        layers, _, tokens, heads, size = piece.shape
        key, value = torch.empty(2, layers, tokens, heads, size)
        half = max(1, tokens // _HALVES)
        ways = ((self._threads, tokens), (_TWO_THREADS, tokens), (self._threads, half))
        best = [float("inf")] * 4
        for _ in range(_REPEAT):
            torch.set_num_threads(self._threads)
            start = time.perf_counter()
            data = _object(codec, name, tables, piece)
            best[0] = min(best[0], time.perf_counter() - start)
            for way, (threads, length) in enumerate(ways, start=1):
                torch.set_num_threads(threads)
                start = time.perf_counter()
                index = _index(data)
                begin, end = index.range_of(0, length)
                stored = unpack_range(index, 0, length, memoryview(data)[begin:end])
                codec.restore(stored.coded, 0, Rows(key[:, :length], value[:, :length], 0, self._rotations))
                best[way] = min(best[way], time.perf_counter() - start)
        return data, _Times(*best)


class _Times(NamedTuple):
    """Seconds for one piece."""

    encode: float
    decode: float
    decode_two_threads: float
    decode_half: float


def _there_and_back(codec: Codec, kv: Tensor) -> Tensor:
    _, _, _, heads, size = kv.shape
    return codec.decode(unpack(memoryview(_object(codec, "", "", kv))).coded, heads, size, kv.dtype)


def _index(data: bytearray) -> ObjectIndex:
    index = open_index(memoryview(data))
    assert not isinstance(index, int)
    return index


def _object(codec: Codec, name: str, tables: str, kv: Tensor) -> bytearray:
    """The stored object of a piece, with tokens that only serve to fill it."""
    chunk = ChunkKV(np.arange(kv.shape[2], dtype=np.int32), kv)
    _, parts = coded(chunk, KVScope(DEFAULT_NAMESPACE, "0" * 32), NO_CONTEXT, name, codec, tables)
    return bytearray().join(parts)
