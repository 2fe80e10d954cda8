"""How vLLM is started with our worker class and connector, and starting it in this process."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache_rag.engine.settings import EngineSettings
from lmcache_rag.errors import EngineError, LmcacheRagError

if TYPE_CHECKING:
    from vllm import LLMEngine

_CPU_KV_CACHE_BYTES = 2 << 30
_CPU_BLOCK_TOKENS = 32
_CUSTOM_OPS = {"custom_ops": ["all"]}
"""Where vLLM compiles the model, it takes PyTorch's own operators for the compiler to fuse. A blend's passes run the
model uncompiled, and would launch each of these alone: on an H100 a pass of an 8B model takes 50 ms so, and 17 ms with
vLLM's fused kernels."""

_STRUCTURED_OUTPUTS = {"backend": "xgrammar", "disable_any_whitespace": True}
"""JSON without whitespace: small models, where it is allowed, write nothing else to the end."""


def start_vllm(settings: EngineSettings, model_folder: Path, threads: int) -> LLMEngine:
    """An engine that the calling thread owns, and computes with `threads` CPU threads.

    Raises:
        EngineError: vLLM is missing or does not start.
        LmcacheRagError: one of our own parts refuses: the model cannot be blended, the store cannot be written to.
    """
    _quieten()
    bear_numba()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if settings.forced_answers:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # its logits processors have another interface
    on_cpu = runs_on_cpu()
    import torch
    from vllm import EngineArgs, LLMEngine
    from vllm.config import KVTransferConfig, StructuredOutputsConfig

    set_num_threads = torch.set_num_threads
    if on_cpu:
        set_num_threads(threads)
    # Its only client is this process.
    connector = {
        "clients_choose_namespace": True,
        "clients_precompute": True,
        "learn_unsalted": True,
        "match_unit_tokens": 1,
    }
    arguments = engine_arguments(settings, model_folder, connector, on_cpu=on_cpu)
    arguments["kv_transfer_config"] = KVTransferConfig(**arguments["kv_transfer_config"])
    arguments["structured_outputs_config"] = StructuredOutputsConfig(**arguments["structured_outputs_config"])
    try:
        return LLMEngine.from_engine_args(
            EngineArgs(
                max_logprobs=-1,
                logits_processors=["lmcache_rag.vllm.forced:ForcedTokens"] if settings.forced_answers else None,
                use_tqdm_on_load=False,
                **arguments,
            )
        )
    except Exception as error:
        raise _failure(error) from error
    finally:
        torch.set_num_threads = set_num_threads  # vLLM disables it on CPUs, for the whole process


def bear_numba() -> None:
    """Let vLLM start in a process that has imported numba, as notebooks do, and as vLLM's own n-gram speculation does.

    On CPUs, vLLM 0.32 looks for kernels in the attributes of all that any module holds; llvmlite's library looks every
    name up as a symbol, `__dict__` too, and vLLM fails over the function that it gets. An empty one is found here.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    symbols = getattr(getattr(ffi, "lib", None), "_fntab", None)
    if symbols is not None:
        symbols["__dict__"] = {}


def runs_on_cpu() -> bool:
    """Whether vLLM computes on the CPU here. Raises `EngineError` where it is missing."""
    try:
        from vllm.platforms import current_platform
    except (ImportError, RuntimeError, OSError) as error:
        raise EngineError(
            f"vLLM cannot be imported ({error}): install the extra `cpu` or `cuda`; where torchvision or torchaudio is "
            "named, uninstall it (text models do not need it)."
        ) from error
    return bool(current_platform.is_cpu())


def engine_arguments(
    settings: EngineSettings, model_folder: Path, connector: dict[str, Any], *, on_cpu: bool
) -> dict[str, Any]:
    """What vLLM is started with, in this process or as a server: `EngineArgs` by name, those left out that vLLM is to
    decide.

    Args:
        connector: fields of `ConnectorConfig` besides those that `settings` name.
    """
    arguments = {
        "model": str(model_folder),
        "dtype": _compute_dtype(settings.dtype, model_folder, on_cpu=on_cpu),
        "max_model_len": settings.max_model_len,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "max_num_seqs": settings.max_num_seqs,
        "speculative_config": settings.speculative_config,
        "kv_cache_memory_bytes": settings.kv_cache_bytes or (_CPU_KV_CACHE_BYTES if on_cpu else None),
        "block_size": settings.block_tokens or (_CPU_BLOCK_TOKENS if on_cpu else None),
        "enforce_eager": on_cpu,
        "compilation_config": None if on_cpu else _CUSTOM_OPS,
        "enable_prefix_caching": settings.prefix_caching,
        "seed": settings.seed,
        "structured_outputs_config": _STRUCTURED_OUTPUTS,
        "worker_cls": "lmcache_rag.vllm.worker.BlendWorker",
        "kv_transfer_config": {
            "kv_connector": "BlendConnector",
            "kv_connector_module_path": "lmcache_rag.vllm.connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "store": settings.store,
                "tiers": settings.tiers,
                "namespace": settings.namespace,
                "codec": settings.codec,
                "extra_codecs": settings.extra_codecs,
                "throttle": asdict(settings.throttle) if settings.throttle is not None else None,
                "hot_bytes": settings.hot_bytes,
                "never_slower": settings.never_slower,
                "refine": settings.refine,
                "learn": settings.learn,
                "trace": settings.trace,
                "conversations": settings.conversations,
                "capacity_bytes": settings.capacity_bytes,
                "ttl_s": settings.ttl_s,
                "conversations_ttl_s": settings.conversations_ttl_s,
                "eviction": settings.eviction,
                **connector,
            },
        },
    }
    return {name: value for name, value in arguments.items() if value is not None}


def _quieten() -> None:
    """Keep vLLM's start-up notes off the user's terminal; errors still show. `VLLM_LOGGING_LEVEL=INFO` shows all."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")


def _compute_dtype(dtype: str, model_folder: Path, *, on_cpu: bool) -> str:
    """vLLM's name of the compute type: the model's own, also where that is float32, which vLLM would cut short; and
    float32 on a CPU without native bfloat16, where it is several times faster."""
    if dtype != "auto" or not on_cpu:
        return dtype
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        flags = ""
    native = any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))
    config = json.loads((model_folder / "config.json").read_text())
    stored = str(config.get("dtype") or config.get("torch_dtype"))
    return "float32" if not native or stored == "float32" else dtype


def _failure(error: BaseException) -> LmcacheRagError:
    """Our own errors as they are, also where vLLM wraps them; else one that says that vLLM did not start."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LmcacheRagError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return EngineError(f"vLLM did not start: {error}")
