"""Learning: the KV is the one that engines store, and the gradients are those of position-free K and V."""

from __future__ import annotations

import pytest
import torch
from lmcache_rag_kernels import rotate

from lmcache_rag.chunk_kv import key_of
from lmcache_rag.engine import LocalEngine
from lmcache_rag.errors import ModelError
from lmcache_rag.learn.tables import learn, load_model, position_free
from lmcache_rag.library.loaded import LoadedKV
from tests.helpers import ingest, parts, random_plan

CPU = torch.device("cpu")


def rotations(engine: LocalEngine) -> list:
    from lmcache_rag.vllm.worker import bound_model

    return [spec.rotation for spec in bound_model().specs]


def test_kv_is_what_the_engine_stores(tiny: LocalEngine) -> None:
    from transformers import DynamicCache

    plan = random_plan(3, chunks=(150,))
    ingest(tiny, plan)
    _, (chunk,), _ = parts(plan)
    stored = tiny.chunk_store()
    [name] = (form.name for form in stored.variants(key_of(chunk)).values())
    from lmcache_rag.library.tables import ModelCodecs

    stored._codecs = ModelCodecs(tiny.store, tiny.model_fingerprint, tiny._shape)
    loaded = stored.load(name, tiny._shape)
    assert isinstance(loaded, LoadedKV)
    model, cache = load_model(tiny.model_folder, torch.float32, CPU), DynamicCache()
    start, end = plan.segments[0].start, plan.segments[0].end
    with torch.no_grad():
        model(torch.tensor([plan.token_ids[:end]]), past_key_values=cache)
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    found = position_free(tensors, rotations(tiny), start, end)
    torch.testing.assert_close(found, loaded.kv().flatten(3), atol=2e-4, rtol=1e-3)


def test_gradients_are_by_position_free_kv(llama: LocalEngine) -> None:
    """Moving position-free K and V a little changes the log-probability as the gradient says."""
    from transformers import DynamicCache

    model, turns = load_model(llama.model_folder, torch.float64, CPU), rotations(llama)
    plan = random_plan(4, preamble=5, chunks=(30,), rest=6)
    start, end = plan.segments[0].start, plan.segments[0].end
    ids = torch.tensor([plan.token_ids])
    cache = DynamicCache()
    with torch.no_grad():
        model(ids[:, :end], past_key_values=cache)
    leaves = [t.clone().requires_grad_(True) for layer in cache.layers for t in (layer.keys, layer.values)]

    def likelihood(tensors: list[torch.Tensor]) -> torch.Tensor:
        used = DynamicCache()
        for index in range(len(turns)):
            used.update(tensors[2 * index], tensors[2 * index + 1], index)
        return model(ids[:, end:], past_key_values=used).logits[0, -1].log_softmax(-1)[7]

    gradient = position_free(torch.autograd.grad(likelihood(leaves), leaves), turns, start, end)
    move = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0)).double()

    def moved(by: float) -> list[torch.Tensor]:
        copies = [leaf.detach().clone() for leaf in leaves]
        for layer, turn in enumerate(turns):
            for part in range(2):
                change = move[layer, part].unflatten(-1, (leaves[0].shape[1], -1))
                if part == 0 and turn is not None:
                    change = rotate(change, turn, torch.arange(start, end))
                copies[2 * layer + part][0, :, start:end] += by * change.transpose(0, 1)
        return copies

    step = 1e-2
    with torch.no_grad():
        difference = (likelihood(moved(step)) - likelihood(moved(-step))) / (2 * step)
    torch.testing.assert_close(difference, (gradient * move).sum(), atol=1e-3, rtol=5e-3)


def test_the_same_prompts_give_the_same_tables(llama: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [random_plan(seed, chunks=(60, 60)) for seed in range(2)]
    done: list[int] = []
    first = learn(llama.model_folder, torch.float32, CPU, rotations(llama), prompts, done.append)
    assert done == [1, 2]
    assert first.digest == learn(llama.model_folder, torch.float32, CPU, rotations(llama), prompts).digest
    assert first.mean.shape == (3, 2, 64) and first.directions.shape == (3, 2, 1, 64, 64)
    per_head = learn(llama.model_folder, torch.float32, CPU, rotations(llama), prompts, groups=2)
    assert per_head.directions.shape == (3, 2, 2, 32, 32)
    assert per_head.digest != first.digest


def test_a_model_that_transformers_keeps_otherwise_is_refused(llama: LocalEngine) -> None:
    plan = random_plan(1, chunks=(30,))
    with pytest.raises(ModelError, match="--codec q8"):
        learn(llama.model_folder, torch.float32, CPU, rotations(llama)[:2], [plan])
    with pytest.raises(ModelError, match="too little text"):
        learn(llama.model_folder, torch.float32, CPU, rotations(llama), [])
    with pytest.raises(ModelError, match="transformers does not load"):
        learn(llama.model_folder / "absent", torch.float32, CPU, rotations(llama), [plan])
