"""Blending inside vLLM beyond the plain case: misses, other preambles, automatic matching, isolation, and load."""

from __future__ import annotations

import asyncio
import functools
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmcache_rag.chunk_kv import NO_CONTEXT, variant_of
from lmcache_rag.codec import pack, unpack
from lmcache_rag.engine import Completion, LocalEngine, Sampling
from lmcache_rag.engine.loop import Request
from lmcache_rag.errors import EngineError, PromptError
from lmcache_rag.plan.budget import share_of
from lmcache_rag.prompt import MarkedPrompt
from lmcache_rag.request import BlendOptions
from tests.helpers import OFF, answer, connector, ingest, noise, parts, random_plan, worker_half

REUSE = BlendOptions(selector="none", ratio=0.0)
REPAIR = BlendOptions(selector="query", ratio=0.2)


def path_of(engine: LocalEngine, token_ids: list[int], variant: str) -> Path:
    return engine.store.root.joinpath(*engine.chunk_store().name(token_ids, variant).split("/"))


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (Path.unlink, "absent"),
    "flipped bit": (flip_last_byte, "corrupt"),
    "half written": (lambda path: path.write_bytes(path.read_bytes()[:5000]), "corrupt"),
    "empty": (lambda path: path.write_bytes(b""), "corrupt"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("which", [0, 1])
def test_a_miss_is_computed_in_full_and_reported(llama: LocalEngine, damage: str, which: int) -> None:
    plan = random_plan(11)
    ingest(llama, plan)
    preamble, chunks, _ = parts(plan)
    do, reason = DAMAGES[damage]
    do(path_of(llama, chunks[which], variant_of(preamble)))
    tolerance = 20 * noise(llama, plan)
    expected, _ = answer(llama, plan, OFF)
    found, done = answer(llama, plan, BlendOptions(selector="all"))
    assert done.reuse.misses == {reason: len(chunks[which])}
    assert done.reuse.missed_tokens == len(chunks[which])
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    _, done = answer(llama, plan, REPAIR)
    assert done.reuse.mode == "blend" and done.reuse.missed_tokens == len(chunks[which])


def test_a_corrupt_object_is_computed_again_at_the_next_ingest(llama: LocalEngine) -> None:
    plan = random_plan(12)
    ingest(llama, plan)
    preamble, chunks, _ = parts(plan)
    path = path_of(llama, chunks[1], variant_of(preamble))
    good = path.read_bytes()
    flip_last_byte(path)
    answer(llama, plan, REUSE)
    report = llama.precompute(preamble, chunks)
    assert (report.computed, report.present) == (1, 2)
    stored = torch.frombuffer(bytearray(path.read_bytes()[-1024:]), dtype=torch.float32)
    torch.testing.assert_close(
        stored, torch.frombuffer(bytearray(good[-1024:]), dtype=torch.float32), atol=1e-5, rtol=0
    )


def test_what_a_repeated_prompt_finds_in_the_prefix_cache_is_no_miss(llama: LocalEngine) -> None:
    plan = random_plan(45, chunks=(300, 90))
    preamble, (first, _), _ = parts(plan)
    assert not llama.precompute(preamble, [first]).errors
    for local in (False, True):
        _, done = answer(llama, plan, REPAIR, "repeated")
        reuse = done.reuse
        assert (reuse.local_tokens > 400) is local and reuse.vllm_tokens >= 0
        counted = reuse.local_tokens + reuse.reused_tokens + reuse.recomputed_tokens + reuse.missed_tokens
        assert counted + reuse.unknown_tokens + reuse.vllm_tokens == reuse.prompt_tokens


def test_cached_tokens_are_those_that_were_neither_computed_nor_recomputed(
    llama: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = random_plan(46, chunks=(300, 90))
    ingest(llama, plan)
    cached: list[int] = []
    take = Request.take

    def taken(self: Request, output: Any, now: float) -> str:
        cached.append(output.num_cached_tokens)
        return take(self, output, now)

    monkeypatch.setattr(Request, "take", taken)
    _, done = answer(llama, plan, REPAIR, tokens=1)
    assert done.reuse.recomputed_tokens > 0 and cached == [done.reuse.reused_tokens]
    _, done = answer(llama, plan, OFF, tokens=1)
    assert cached[1:] == [0]


def test_misses_at_the_end_are_left_to_vllm(llama: LocalEngine) -> None:
    plan = random_plan(13)
    preamble, chunks, rest = parts(plan)
    llama.precompute(preamble, chunks[:2])
    _, done = answer(llama, plan, REUSE)
    reuse = done.reuse
    assert reuse.misses == {"absent": len(chunks[2])}
    assert reuse.vllm_tokens == len(rest)
    assert reuse.reused_tokens == len(preamble) + len(chunks[0]) + len(chunks[1])


def test_nothing_stored_is_plain_prefill(llama: LocalEngine) -> None:
    plan = random_plan(14)
    expected, _ = answer(llama, plan, OFF)
    found, done = answer(llama, plan, REPAIR)
    assert done.reuse.mode == "plain" and done.reuse.reason == "no chunk of the prompt is stored"
    assert done.reuse.missed_tokens == sum(segment.length for segment in plan.segments)
    assert torch.equal(found, expected)


def test_mostly_missing_is_plain_prefill(llama: LocalEngine) -> None:
    plan = random_plan(15, chunks=(200, 40))
    preamble, chunks, _ = parts(plan)
    llama.precompute(preamble, chunks[1:])
    _, done = answer(llama, plan, REPAIR)
    assert done.reuse.mode == "plain" and done.reuse.missed_tokens == 200


def test_off_is_untouched_vllm(llama: LocalEngine) -> None:
    plan = random_plan(16)
    before, _ = answer(llama, plan, OFF)
    ingest(llama, plan)
    after, done = answer(llama, plan, OFF)
    assert done.reuse.mode == "off" and done.reuse.reused_tokens == 0
    assert torch.equal(before, after)


def test_another_preamble_gets_a_larger_budget_and_is_reported(llama: LocalEngine) -> None:
    plan = random_plan(17)
    ingest(llama, plan)
    _, chunks, rest = parts(plan)
    other = MarkedPrompt.assemble(list(range(50, 80)), chunks, rest)
    _, done = answer(llama, other, REPAIR)
    total = sum(map(len, chunks))
    assert done.reuse.foreign_tokens == total
    assert done.reuse.exact_tokens == 0
    assert done.reuse.unknown_tokens == 30
    assert done.reuse.recomputed_tokens == math.ceil(total * share_of(0.2, foreign=True)) > total // 5


def test_own_variant_is_preferred(llama: LocalEngine) -> None:
    plan = random_plan(18)
    ingest(llama, plan)
    _, chunks, rest = parts(plan)
    other = MarkedPrompt.assemble(list(range(50, 80)), chunks, rest)
    ingest(llama, other)
    for prompt in (plan, other):
        _, done = answer(llama, prompt, REUSE)
        assert done.reuse.foreign_tokens == 0 and done.reuse.unknown_tokens == 0


def test_chunks_are_found_without_being_marked(llama: LocalEngine) -> None:
    plan = random_plan(19)
    ingest(llama, plan)
    marked, by_mark = answer(llama, plan, REPAIR)
    _, chunks, rest = parts(plan)
    done = llama.generate(plan.token_ids, Sampling(max_tokens=4, ignore_eos=True, logprobs=-1), REPAIR, cache_salt="x")
    found = torch.stack([torch.tensor([row[token] for token in sorted(row)]) for row in done.logprobs])
    assert done.reuse.reused_tokens == by_mark.reuse.reused_tokens
    assert torch.equal(found, marked)
    # Other text around and between, and the first and last tokens merged away.
    prompt = [*range(50, 60), *chunks[2][2:], 7, 8, 9, *chunks[0][:-1], *rest]
    done = llama.generate(prompt, Sampling(max_tokens=1), REPAIR)
    assert done.reuse.foreign_tokens == len(chunks[2]) - 2 + len(chunks[0]) - 1
    assert done.reuse.unknown_tokens == 13


def test_automatic_parts_are_exact_where_everything_is_recomputed(llama: LocalEngine) -> None:
    plan = random_plan(20, chunks=(150, 120))
    ingest(llama, plan)
    _, chunks, rest = parts(plan)
    prompt = MarkedPrompt.assemble([9, 8, 7], [[*chunks[1][30:], 5, *chunks[0][:100], *rest]], [])
    prompt = MarkedPrompt(prompt.token_ids, 3, ())
    tolerance = 20 * noise(llama, prompt)
    expected, _ = answer(llama, prompt, OFF)
    found, done = answer(llama, prompt, BlendOptions(selector="all"))
    assert done.reuse.recomputed_tokens == 189  # the first four tokens of a prompt are computed
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_blended_kv_never_reaches_exact_requests(llama: LocalEngine) -> None:
    """The same caller's salt, the same tokens: whatever was blended before, `off` gives the same logits."""
    plan = random_plan(21, preamble=70)
    ingest(llama, plan)
    exact, _ = answer(llama, plan, OFF)
    reused, _ = answer(llama, plan, REUSE, "salt")
    assert float((reused - exact).abs().max()) > 0.01, "the blend must differ for this test to mean anything"
    found, _ = answer(llama, plan, OFF, "salt")
    torch.testing.assert_close(found, exact, atol=20 * noise(llama, plan), rtol=0)
    longer = MarkedPrompt.assemble(list(plan.token_ids), [[5] * 40], [6])
    expected, _ = answer(llama, longer, OFF)
    found, _ = answer(llama, longer, OFF, "salt")
    torch.testing.assert_close(found, expected, atol=20 * noise(llama, plan), rtol=0)


def test_blends_of_different_kinds_are_kept_apart_and_equal_ones_are_shared(llama: LocalEngine) -> None:
    plan = random_plan(22, preamble=70)
    ingest(llama, plan)
    fresh, _ = answer(llama, plan, REPAIR)
    answer(llama, plan, REUSE, "salt")
    found, done = answer(llama, plan, REPAIR, "salt")
    assert done.reuse.mode == "blend"
    torch.testing.assert_close(found, fresh, atol=20 * noise(llama, plan), rtol=0)
    again, done = answer(llama, plan, REPAIR, "salt")
    assert done.reuse.reason == "blended KV in the local prefix cache"
    assert done.reuse.mode == "blend" and done.reuse.local_tokens > 300
    assert done.reuse.local_tokens + done.reuse.vllm_tokens == len(plan.token_ids)
    # vLLM has computed what did not fill a block, so that it is near to the first answer, not the same.
    torch.testing.assert_close(again[0], fresh[0], atol=0.1, rtol=0)


def test_exact_prefix_hits_are_kept(llama: LocalEngine) -> None:
    """A preamble that vLLM has computed for another request is not computed or loaded again into other blocks."""
    plan = random_plan(23, preamble=100)
    ingest(llama, plan)
    llama.generate(plan.token_ids[:100], Sampling(max_tokens=1), OFF, cache_salt="shared")
    expected, _ = answer(llama, plan, REPAIR)
    found, done = answer(llama, plan, REPAIR, "shared")
    assert done.reuse.local_tokens == 96  # whole blocks of 32
    torch.testing.assert_close(found, expected, atol=20 * noise(llama, plan), rtol=0)


def test_namespaces_see_nothing_of_each_other(llama: LocalEngine) -> None:
    plan = random_plan(24)
    ingest(llama, plan)
    other = REUSE.model_copy(update={"namespace": "other"})
    _, done = answer(llama, plan, other)
    assert done.reuse.mode == "plain" and done.reuse.bytes_loaded == 0
    done = llama.generate(plan.token_ids, Sampling(max_tokens=1), BlendOptions(namespace="other"), cache_salt="auto")
    assert done.reuse.mode == "plain"


def test_several_requests_at_once(llama: LocalEngine) -> None:
    plans = [random_plan(seed, chunks=(60, 80)) for seed in range(30, 38)]
    for plan in plans:
        ingest(llama, plan)
    alone = [answer(llama, plan, REPAIR)[0] for plan in plans]

    async def together() -> list[Completion]:
        sampling = Sampling(max_tokens=4, ignore_eos=True, logprobs=-1)
        requests = [llama.agenerate(plan, sampling, REPAIR, cache_salt="together") for plan in plans]
        requests += [llama.agenerate(plan, sampling, OFF, cache_salt="plain") for plan in plans]
        return await asyncio.gather(*requests)

    done = asyncio.run(together())
    tolerance = 20 * noise(llama, plans[0])
    for expected, completion in zip(alone, done[: len(plans)], strict=True):
        assert completion.reuse.mode == "blend"
        found = torch.stack([torch.tensor([row[token] for token in sorted(row)]) for row in completion.logprobs])
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    assert all(completion.reuse.mode == "off" for completion in done[len(plans) :])


def test_a_first_token_does_not_wait_for_the_next_blend(llama: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    plans = [random_plan(seed, chunks=(60, 80)) for seed in (38, 39)]
    for plan in plans:
        ingest(llama, plan)
    events: list[str] = []
    worker, ended = get_kv_transfer_group()._worker, threading.Semaphore(0)
    begin = worker.begin

    def noted(job: Any) -> None:
        events.append("blend")
        begin(job)

    def deliver(name: str, delta: Any) -> None:
        events.append(name)
        if delta.completion is not None:
            ended.release()

    monkeypatch.setattr(worker, "begin", noted)
    sampling = Sampling(max_tokens=1, ignore_eos=True)
    for name, plan in zip(("first", "second"), plans, strict=True):
        llama._submit(plan, sampling, REPAIR, "pair", functools.partial(deliver, name))
    for _ in plans:
        ended.acquire()
    assert events == ["blend", "first", "blend", "second"]


def test_a_stream_goes_on_while_another_request_is_blended(llama: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step has 256 tokens here, of which the blend takes what the stream leaves. At r=1 it is full prefill."""
    plan, events, ended = random_plan(42, chunks=(300, 300, 200)), [], threading.Semaphore(0)
    ingest(llama, plan)
    tolerance = 20 * noise(llama, plan)
    expected, _ = answer(llama, plan, OFF, tokens=1)
    worker = worker_half()
    begin = worker.begin

    def begun(job: Any) -> None:
        events.append("begun")
        begin(job)

    def streamed(delta: Any) -> None:
        if not events:
            sampling = Sampling(max_tokens=1, logprobs=-1)
            llama._submit(plan, sampling, BlendOptions(ratio=1.0), "blended", answered)
        events.append("token")
        if delta.completion is not None:
            ended.release()

    def answered(delta: Any) -> None:
        events.append(delta)
        ended.release()

    monkeypatch.setattr(worker, "begin", begun)
    llama._submit(random_plan(43), Sampling(max_tokens=60, ignore_eos=True), OFF, "stream", streamed)
    for _ in range(2):
        ended.acquire()
    (done,) = [event.completion for event in events if not isinstance(event, str)]
    between = events[events.index("begun") : next(i for i, event in enumerate(events) if not isinstance(event, str))]
    assert between.count("token") >= 3  # 800 tokens are some four steps' work
    assert done.reuse.mode == "blend" and done.reuse.recomputed_tokens > 400
    found = torch.tensor([done.logprobs[0][token] for token in sorted(done.logprobs[0])])
    torch.testing.assert_close(found, expected[0], atol=tolerance, rtol=0)


def test_a_request_aborted_while_it_is_blended_leaves_nothing(
    llama: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = random_plan(44, chunks=(300, 300, 200))
    ingest(llama, plan)
    pool = connector(llama).scheduler._chooser.prefixes._pool
    worker = worker_half()
    free, go_on = pool.get_num_free_blocks(), worker.go_on
    rounds: list[float] = []

    def slowly(tokens: float) -> None:
        """As if other requests left 32 tokens a step, until the third one, in which the request is aborted."""
        rounds.append(tokens)
        if len(rounds) == 3:
            llama._loop.abort(next(iter(llama._loop._requests)))
        go_on(32)

    with monkeypatch.context() as patch:
        patch.setattr(worker, "go_on", slowly)
        llama._submit(plan, Sampling(max_tokens=5), BlendOptions(ratio=0.5), "aborted", lambda _: None)
        llama.settle()
    assert 3 <= len(rounds) < 10 and worker._under_way is None
    assert pool.get_num_free_blocks() == free and not connector(llama).scheduler._tracked
    _, done = answer(llama, plan, BlendOptions(ratio=0.5))
    assert done.reuse.mode == "blend" and not done.reuse.missed_tokens


def test_a_question_longer_than_a_step_is_chunked_by_vllm(llama: LocalEngine) -> None:
    plan = random_plan(40, chunks=(100, 60), rest=400)
    ingest(llama, plan)
    tolerance = 20 * noise(llama, plan)
    expected, _ = answer(llama, plan, OFF)
    found, done = answer(llama, plan, BlendOptions(selector="all"))
    assert done.reuse.vllm_tokens == 400
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    _, done = answer(llama, plan, REPAIR)
    assert done.reuse.recomputed_tokens == 32


def test_a_prompt_that_ends_in_a_chunk(llama: LocalEngine) -> None:
    plan = random_plan(41, chunks=(100, 60), rest=0)
    ingest(llama, plan)
    tolerance = 20 * noise(llama, plan)
    expected, _ = answer(llama, plan, OFF)
    found, done = answer(llama, plan, BlendOptions(selector="all"))
    assert done.reuse.vllm_tokens == 1
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_segments_outside_the_prompt_pass_through_and_say_so(llama: LocalEngine) -> None:
    plan = random_plan(43)
    ingest(llama, plan)
    options = BlendOptions(segments=((21, 5000),))
    done = llama.generate(plan.token_ids, Sampling(max_tokens=1), options)
    assert done.reuse.mode == "plain" and "behind the prompt" in done.reuse.reason


def test_too_long_prompts_and_chunks_are_refused_in_words(llama: LocalEngine) -> None:
    with pytest.raises(PromptError, match="The prompt has 1024 tokens, but the model takes 1023"):
        llama.generate([5] * 1024)
    with pytest.raises(PromptError, match="empty"):
        llama.generate([])
    with pytest.raises(PromptError, match="half a surrogate pair"):
        llama.generate("w5 \udcff")
    progress: list[int] = []
    report = llama.precompute([5] * 24, [[6] * 40, [6] * 1000, [], [7] * 40], progress.append)
    assert (report.computed, list(report.errors)) == (2, [1, 2])
    assert "split the documents into smaller chunks" in report.errors[1] and "empty" in report.errors[2]
    assert progress == [40, 1000, 0, 40]
    with pytest.raises(EngineError, match=r"Chunk 1 is not stored\. It has 1000 tokens"):
        report.check()


def test_leaving_a_stream_aborts_the_request(llama: LocalEngine) -> None:
    plan = random_plan(44)
    ingest(llama, plan)
    stream = llama.stream(plan, Sampling(max_tokens=500, ignore_eos=True), REPAIR, cache_salt="one")
    next(stream)
    stream.close()
    llama.generate([5, 6, 7], Sampling(max_tokens=2), OFF)
    assert llama._loop.engine.get_num_unfinished_requests() == 0
    done = llama.generate(plan, Sampling(max_tokens=2), REPAIR, cache_salt="another")  # the engine goes on
    assert done.reuse.mode == "blend"


def test_an_event_loop_that_is_gone_does_not_stop_the_engine(llama: LocalEngine) -> None:
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(llama.agenerate([5] * 50, Sampling(max_tokens=900, ignore_eos=True), OFF), 0.05))
    done = llama.generate([5, 6, 7], Sampling(max_tokens=3, ignore_eos=True), OFF)
    assert len(done.token_ids) == 3


def test_a_layer_that_does_not_fit_is_a_miss(llama: LocalEngine) -> None:
    """Right checksums, wrong contents: half of each layer is missing."""
    plan = random_plan(47)
    ingest(llama, plan)
    preamble, chunks, _ = parts(plan)
    path = path_of(llama, chunks[1], variant_of(preamble))
    stored = unpack(memoryview(bytearray(path.read_bytes())))
    coded = stored.coded
    halves = [
        [coded.stream(group, layer)[: int(length) // 2] for layer, length in enumerate(lengths)]
        for group, lengths in enumerate(coded.places[:, :, 1])
    ]
    path.write_bytes(b"".join(bytes(part) for part in pack(stored.header, stored.token_ids, halves)))
    _, done = answer(llama, plan, REPAIR)
    assert done.reuse.misses == {"corrupt": len(chunks[1])}


def test_a_stored_preamble_alone_is_exact_and_shared(llama: LocalEngine) -> None:
    plan = random_plan(48, preamble=100)
    ingest(llama, plan)
    prompt = [*plan.token_ids[:100], 7, 8, 9]
    first = llama.generate(prompt, Sampling(max_tokens=2), cache_salt="shared preamble")
    assert first.reuse.exact_tokens == first.reuse.reused_tokens == 100
    second = llama.generate([*prompt[:100], 11, 12], Sampling(max_tokens=2), OFF, cache_salt="shared preamble")
    assert second.reuse.local_tokens == 96
    assert second.reuse.vllm_tokens == 6


def test_blocks_that_fill_up_while_generating_are_salted_too(llama: LocalEngine) -> None:
    """A prompt with no full block behind its preamble's: the next block is filled by what is generated."""
    plan = random_plan(49, preamble=64, chunks=(6, 6), rest=12)
    ingest(llama, plan)
    sampling = Sampling(max_tokens=30, ignore_eos=True)
    blended = llama.generate(plan, sampling, REUSE, cache_salt="salt")
    assert blended.reuse.mode == "blend"
    longer = [*plan.token_ids, *blended.token_ids, 5, 6]
    done = llama.generate(longer, Sampling(max_tokens=1), OFF, cache_salt="salt")
    assert done.reuse.local_tokens <= 64


def test_precompute_stores_preamble_and_chunk_once(llama: LocalEngine) -> None:
    plan = random_plan(45)
    preamble, chunks, _ = parts(plan)
    progress: list[int] = []
    first = llama.precompute(preamble, chunks, progress.append)
    assert (first.computed, first.present, first.tokens) == (3, 0, len(preamble) + sum(map(len, chunks)))
    assert progress == [len(chunk) for chunk in chunks]
    assert path_of(llama, preamble, NO_CONTEXT).is_file()
    second = llama.precompute(preamble, chunks)
    assert (second.computed, second.present, second.bytes_stored) == (0, 3, 0)
    stored = sum(file.stat().st_size for file in (llama.store.root / "default").rglob("*.v3"))
    assert stored == first.bytes_stored
    assert first.bytes_stored == pytest.approx(first.tokens * llama.kv_bytes_per_token, rel=0.1)
    assert np.isclose(llama.kv_bytes_per_token, 2 * 3 * 2 * 32 * 4)


def test_phases_add_up_to_the_ttft(llama: LocalEngine) -> None:
    plan = random_plan(50)
    ingest(llama, plan)
    blend = {"load", "select", "recompute", "write"}
    for options, own in ((REPAIR, blend), (REUSE, blend), (OFF, set())):
        _, done = answer(llama, plan, options)
        phases_s = done.reuse.phases_s
        assert set(phases_s) == {"plan", "queue", "vllm"} | own
        assert min(phases_s.values()) >= 0
        assert sum(phases_s.values()) == pytest.approx(done.ttft_s, abs=1e-6)

    async def together() -> list[Completion]:
        requests = [llama.agenerate(plan, Sampling(max_tokens=2), REPAIR, cache_salt=str(n)) for n in range(3)]
        return await asyncio.gather(*requests)

    for done in asyncio.run(together()):
        assert sum(done.reuse.phases_s.values()) == pytest.approx(done.ttft_s, abs=1e-6)


def test_a_preamble_in_memory_needs_its_object_no_more(llama: LocalEngine) -> None:
    plan = random_plan(51)
    ingest(llama, plan)
    preamble, _, _ = parts(plan)
    expected, before = answer(llama, plan, REUSE)
    flip_last_byte(path_of(llama, preamble, NO_CONTEXT))
    found, done = answer(llama, plan, REUSE)
    assert done.reuse.misses == {} and done.reuse.bytes_loaded == before.reuse.bytes_loaded
    assert done.reuse.exact_tokens == before.reuse.exact_tokens == len(preamble) + plan.segments[0].length
    assert torch.equal(found, expected)


def test_figures_are_summed_for_prometheus(llama: LocalEngine) -> None:
    from prometheus_client import REGISTRY

    def value(name: str) -> float:
        samples = [sample for family in REGISTRY.collect() for sample in family.samples if sample.name == name]
        return sum(sample.value for sample in samples)

    plan = random_plan(46)
    ingest(llama, plan)
    llama.generate([5, 6, 7], Sampling(max_tokens=2), OFF)  # flushes what the step before has counted
    before = value("vllm:lmcache_rag_recomputed_tokens_total"), value("vllm:lmcache_rag_reused_tokens_total")
    _, done = answer(llama, plan, REPAIR)
    llama.generate([5, 6, 7], Sampling(max_tokens=2), OFF)
    after = value("vllm:lmcache_rag_recomputed_tokens_total"), value("vllm:lmcache_rag_reused_tokens_total")
    assert after[0] - before[0] == done.reuse.recomputed_tokens > 0
    assert after[1] - before[1] == done.reuse.reused_tokens > 0
