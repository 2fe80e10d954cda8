"""What a GPU gains: full prefill against blends, on a model of an 8B Llama's shape whose weights are random.

    python examples/gpu_check.py                                    # 18 GB of disk, five minutes
    python examples/gpu_check.py --layers 2 --hidden 64 --heads 2   # tiny, to see that it runs

No model is downloaded. Weights are random, so this tells times, and that recomputing everything is full prefill; not
how good answers are. Codec tables are made up too, of two bits a value. `--store /dev/shm` leaves the disk out. What
one H100 gave is in docs/sizing.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
import uuid
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from lmcache_rag.bench.scores import kl_divergence, log_probs
from lmcache_rag.codec.tables import CodecTables, head_groups, laplace_distributions
from lmcache_rag.engine import Completion, EngineSettings, LocalEngine, Sampling
from lmcache_rag.learn import shipped
from lmcache_rag.prompt import MarkedPrompt
from lmcache_rag.request import BlendOptions

VOCABULARY = 32_000
PREAMBLE, QUESTION = 40, 24
KINDS = {
    "full prefill": BlendOptions(mode="off"),
    "r = 0": BlendOptions(selector="none", ratio=0.0),
    "r = 0.05": BlendOptions(ratio=0.05),
    "r = 0.15": BlendOptions(ratio=0.15),
    "all recomputed": BlendOptions(selector="all", ratio=1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=0, help="by default a quarter of the heads")
    parser.add_argument("--chunks", default="5x576,8x900", help="how many, and tokens of each; several prompts")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--store", default="", help="folder; one in memory leaves the disk out")
    options = parser.parse_args()
    os.environ.update(LMCACHE_RAG_NEVER_SLOWER="false", LMCACHE_RAG_REFINE="off", LMCACHE_RAG_LEARN="off")
    prompts = [tuple(map(int, prompt.split("x"))) for prompt in options.chunks.split(",")]
    longest = max(PREAMBLE + count * each + QUESTION for count, each in prompts) + 16
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        kv_heads = options.kv_heads or max(1, options.heads // 4)
        write_model(model, options.layers, options.hidden, options.heads, kv_heads)
        tables = Path(folder) / "tables"
        tables.write_bytes(made_up_tables(options.layers, kv_heads, options.hidden // options.heads).to_bytes())
        settings = EngineSettings(
            model=str(model),
            store=Path(options.store or folder) / f"gpu-check-{uuid.uuid4().hex}",
            codec="balanced",
            max_model_len=longest,
            max_num_batched_tokens=longest,
            primed=False,
            hot_bytes=0,
        )
        with patch.object(shipped, "SHIPPED", tables), patch.object(shipped, "is_default_model", lambda _: True):
            engine = LocalEngine(settings)
            try:
                device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
                print(f"{device}, PyTorch {torch.__version__}")
                for count, each in prompts:
                    measure(engine, count, each, options.repeats)
            finally:
                engine.chunk_store().clear()
                engine.close()


def measure(engine: LocalEngine, count: int, each: int, repeats: int) -> None:
    """Print the TTFT of a prompt of so many chunks, alternating between the kinds, and how near "all" is to prefill."""
    draw = random.Random(1)  # noqa: S311  # of nothing secret
    preamble, chunks, question = (tokens(draw, n) for n in (PREAMBLE, count * each, QUESTION))
    chunks = [chunks[start : start + each] for start in range(0, len(chunks), each)]
    engine.precompute(preamble, chunks)
    rows = {name: answer(engine, preamble, chunks, question, kind, logprobs=-1)[1] for name, kind in KINDS.items()}
    prefill, repaired = (log_probs(rows[name].logprobs or ()) for name in ("full prefill", "all recomputed"))
    seconds: dict[str, list[float]] = {name: [] for name in KINDS}
    reports = {}
    for turn in range(repeats + 2):
        for name, kind in KINDS.items():
            took, done = answer(engine, preamble, chunks, tokens(draw, QUESTION), kind)
            reports[name] = done.reuse
            if turn > 1:  # before, kernels are compiled
                seconds[name].append(took)
    plain = statistics.median(seconds["full prefill"])
    print(f"\n{count} chunks of {each} tokens")
    for name, found in seconds.items():
        median, report = statistics.median(found), reports[name]
        phases = ", ".join(f"{phase} {1e3 * took:.0f}" for phase, took in report.phases_s.items() if took > 5e-4)
        times = f"{1e3 * median:7.1f} ms {plain / median:5.2f}x"
        print(f"{name:15} {times}  {report.mode:5}  of the last one: {phases}")
    print(f"all recomputed: KL to full prefill {float(kl_divergence(prefill, repaired).mean()):.1e}")


def answer(
    engine: LocalEngine,
    preamble: list[int],
    chunks: list[list[int]],
    question: list[int],
    kind: BlendOptions,
    logprobs: int | None = None,
) -> tuple[float, Completion]:
    """Seconds to the first token, and that token's distribution where it is asked for."""
    prompt = MarkedPrompt.assemble(preamble, chunks, question)
    sampling = Sampling(max_tokens=1, ignore_eos=True, logprobs=logprobs)
    start = time.perf_counter()
    done = engine.generate(prompt, sampling, kind, cache_salt=uuid.uuid4().hex)
    return time.perf_counter() - start, done


def tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(4, VOCABULARY - 1) for _ in range(count)]


def write_model(folder: Path, layers: int, hidden: int, heads: int, kv_heads: int) -> None:
    """A Llama in bfloat16 with random weights, and a tokenizer of numbered words."""
    inner, size, device = 7 * hidden // 2, hidden // heads, "cuda" if torch.cuda.is_available() else "cpu"
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=size,
        num_hidden_layers=layers,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)

    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device=device, dtype=torch.bfloat16) * 0.02).cpu()

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    part = {"model.embed_tokens.weight": weight(VOCABULARY, hidden), "model.norm.weight": ones}
    shapes = {
        "self_attn.q_proj": (heads * size, hidden),
        "self_attn.k_proj": (kv_heads * size, hidden),
        "self_attn.v_proj": (kv_heads * size, hidden),
        "self_attn.o_proj": (hidden, heads * size),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    places = {}
    for number in range(layers + 1):
        if number:
            prefix = f"model.layers.{number - 1}."
            part = {f"{prefix}{name}.weight": weight(*shape) for name, shape in shapes.items()}
            part |= {f"{prefix}{name}.weight": ones.clone() for name in ("input_layernorm", "post_attention_layernorm")}
        name = f"model-{number:05d}-of-{layers:05d}.safetensors"
        save_file(part, folder / name, {"format": "pt"})
        places |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = [*special.values(), *(f"w{token}" for token in range(len(special), VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def made_up_tables(layers: int, kv_heads: int, size: int) -> CodecTables:
    """Of coordinates whose mean size falls from 2.2 steps to a fiftieth of one, as in a model that was learned."""
    groups = head_groups(kv_heads, size)
    width = kv_heads * size // groups
    falls = 0.26 * np.geomspace(2.2, 0.02, width)
    directions = np.zeros((layers, 2, groups, width, width), np.float16)
    directions[..., np.arange(width), np.arange(width)] = 1 / falls
    sizes = np.tile(falls.astype(np.float32), groups)
    return CodecTables(
        np.zeros((layers, 2, kv_heads * size), np.float32),
        directions,
        np.broadcast_to(sizes, (layers, 2, kv_heads * size)).copy(),
        laplace_distributions(),
    )


if __name__ == "__main__":
    main()
