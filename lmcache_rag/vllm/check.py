"""`make check-vllm`: are the private interfaces of vLLM that we use still there, with the signatures we know?

    python -m lmcache_rag.vllm.check [WHEEL ...]

Reads the sources of the installed vLLM, or of downloaded wheels, without importing them (a CUDA wheel can be checked on
any machine), prints what is missing, and exits with 1 where something is.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Source = Callable[[str], str | None]
"""A file's text by its path within the vllm package; None where there is none."""


@dataclass(frozen=True)
class Function:
    """A function or method that is called or overridden with these parameters, by these names and in this order."""

    path: str
    name: str
    parameters: tuple[str, ...]

    def problem(self, source: Source) -> str:
        node = _find(source, self.path, self.name)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return "is gone"
        found = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        places = [found.index(name) if name in found else -1 for name in self.parameters]
        if -1 in places or places != sorted(places):
            return f"has parameters ({', '.join(found)}), expected ({', '.join(self.parameters)})"
        required = [argument.arg for argument in node.args.args[: len(node.args.args) - len(node.args.defaults)]]
        keywords = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        required += [argument.arg for argument, default in keywords if default is None]
        new = [name for name in required if name not in (*self.parameters, "self", "cls")]
        return f"has new required parameters ({', '.join(new)})" if new else ""


@dataclass(frozen=True)
class Attributes:
    """A class whose objects have these attributes: fields, properties, methods, or set in a method."""

    path: str
    name: str
    attributes: tuple[str, ...]

    def problem(self, source: Source) -> str:
        node = _find(source, self.path, self.name)
        if not isinstance(node, ast.ClassDef):
            return "is gone"
        found = {
            child.attr
            for child in ast.walk(node)
            if isinstance(child, ast.Attribute) and isinstance(child.value, ast.Name) and child.value.id == "self"
        }
        for child in node.body:
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(child.name)
            targets = child.targets if isinstance(child, ast.Assign) else [getattr(child, "target", None)]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
        missing = [name for name in self.attributes if name not in found]
        return f"has no {', '.join(missing)}" if missing else ""


@dataclass(frozen=True)
class Text:
    """A piece of code that must stand in a function or class: behaviour that no signature shows."""

    path: str
    name: str
    text: str

    def problem(self, source: Source) -> str:
        node = _find(source, self.path, self.name)
        if node is None:
            return "is gone"
        return "" if self.text in ast.unparse(node) else f"does not contain `{self.text}` any more"


_BASE = "distributed/kv_transfer/kv_connector/v1/base.py"
_ATTENTION = "model_executor/layers/attention/attention.py"
_SCHEDULER = "v1/core/sched/scheduler.py"
_IMPL = ("alibi_slopes", "logits_soft_cap", "scale")
_UPDATE = ("self", "layer", "key", "value", "kv_cache", "slot_mapping")

INTERFACES: tuple[Function | Attributes | Text, ...] = (
    # The nested forward
    Attributes(
        "forward_context.py", "ForwardContext", ("no_compile_layers", "attn_metadata", "slot_mapping", "skip_compiled")
    ),
    Function("forward_context.py", "override_forward_context", ("forward_context",)),
    Function(_ATTENTION, "get_attention_context", ("layer_name",)),
    Text(_ATTENTION, "get_attention_context", "forward_context.no_compile_layers[layer_name]"),
    Function(_ATTENTION, "unified_attention_with_output", ("query", "key", "value", "output", "layer_name")),
    Text(_ATTENTION, "unified_attention_with_output", "self.impl.forward("),
    Text(_ATTENTION, "unified_kv_cache_update", "if layer_slot_mapping is not None"),
    Attributes(
        _ATTENTION,
        "Attention",
        (
            "num_kv_heads",
            "head_size",
            "head_size_v",
            "sliding_window",
            "has_sink",
            "kv_sharing_target_layer_name",
            "impl",
            "kv_cache",
        ),
    ),
    Attributes("v1/sample/logits_processor/__init__.py", "AdapterLogitsProcessor", ("new_req_logits_processor",)),
    Attributes(
        "model_executor/layers/rotary_embedding/base.py", "RotaryEmbeddingBase", ("cos_sin_cache", "is_neox_style")
    ),
    Function("v1/attention/backends/cpu_attn.py", "CPUAttentionBackendImpl.do_kv_cache_update", _UPDATE),
    Function("v1/attention/backends/flash_attn.py", "FlashAttentionImpl.do_kv_cache_update", _UPDATE),
    Function("v1/attention/backends/flashinfer.py", "FlashInferImpl.do_kv_cache_update", _UPDATE),
    Function("v1/attention/backends/triton_attn.py", "TritonAttentionImpl.do_kv_cache_update", _UPDATE),
    Attributes("v1/attention/backends/cpu_attn.py", "CPUAttentionBackendImpl", _IMPL),
    Attributes("v1/attention/backends/flash_attn.py", "FlashAttentionImpl", _IMPL),
    Attributes("v1/attention/backends/flashinfer.py", "FlashInferImpl", _IMPL),
    Attributes("v1/attention/backends/triton_attn.py", "TritonAttentionImpl", _IMPL),
    Attributes("config/compilation.py", "CompilationConfig", ("static_forward_context",)),
    # The worker class
    Attributes("v1/worker/gpu_worker.py", "Worker", ("load_model", "get_model", "determine_available_memory")),
    Attributes("v1/worker/cpu_worker.py", "CPUWorker", ("determine_available_memory",)),
    # Whatever changes the weights
    Attributes(
        "v1/worker/gpu_worker.py",
        "Worker",
        ("reload_weights", "reset_weights", "init_weight_transfer_engine", "start_weight_update", "update_weights"),
    ),
    Function("v1/worker/gpu_worker.py", "Worker.sleep", ("self", "level")),
    Function("v1/worker/gpu_worker.py", "Worker.wake_up", ("self", "tags")),
    # Engines that are passed through
    Attributes(
        "config/parallel.py",
        "ParallelConfig",
        (
            "pipeline_parallel_size",
            "tensor_parallel_size",
            "data_parallel_size",
            "decode_context_parallel_size",
            "prefill_context_parallel_size",
            "enable_expert_parallel",
            "enable_eplb",
            "enable_elastic_ep",
            "enable_dbo",
            "ubatch_size",
        ),
    ),
    Attributes("config/vllm.py", "VllmConfig", ("lora_config",)),
    Attributes("config/model.py", "ModelConfig", ("is_moe", "uses_mrope")),
    Attributes("config/kv_transfer.py", "KVTransferConfig", ("kv_load_failure_policy", "kv_connector_extra_config")),
    # The connector
    Function(_BASE, "KVConnectorBase_V1.__init__", ("self", "vllm_config", "role", "kv_cache_config")),
    Attributes(
        _BASE,
        "KVConnectorBase_V1",
        ("_vllm_config", "_kv_cache_config", "_get_connector_metadata", "requires_kv_delivery"),
    ),
    Function(_BASE, "KVConnectorBase_V1.register_kv_caches", ("self", "kv_caches")),
    Function(_BASE, "KVConnectorBase_V1.start_load_kv", ("self", "forward_context")),
    Function(_BASE, "KVConnectorBase_V1.get_finished", ("self", "finished_req_ids")),
    Function(_BASE, "KVConnectorBase_V1.get_block_ids_with_load_errors", ("self",)),
    Function(_BASE, "KVConnectorBase_V1.wait_for_layer_load", ("self", "layer_name")),
    Function(_BASE, "KVConnectorBase_V1.save_kv_layer", ("self", "layer_name", "kv_layer", "attn_metadata")),
    Function(_BASE, "KVConnectorBase_V1.wait_for_save", ("self",)),
    Function(_BASE, "KVConnectorBase_V1.build_connector_worker_meta", ("self",)),
    Function(_BASE, "KVConnectorBase_V1.on_new_request", ("self", "request")),
    Function(_BASE, "KVConnectorBase_V1.get_num_new_matched_tokens", ("self", "request", "num_computed_tokens")),
    Function(
        _BASE, "KVConnectorBase_V1.update_state_after_alloc", ("self", "request", "blocks", "num_external_tokens")
    ),
    Function(_BASE, "KVConnectorBase_V1.build_connector_meta", ("self", "scheduler_output")),
    Function(_BASE, "KVConnectorBase_V1.update_connector_output", ("self", "connector_output")),
    Function(_BASE, "KVConnectorBase_V1.request_finished", ("self", "request", "block_ids")),
    Function(_BASE, "KVConnectorBase_V1.get_kv_connector_stats", ("self",)),
    Function(_BASE, "KVConnectorBase_V1.build_kv_connector_stats", ("cls", "data")),
    Function(
        _BASE,
        "KVConnectorBase_V1.build_prom_metrics",
        ("cls", "vllm_config", "metric_types", "labelnames", "per_engine_labelvalues"),
    ),
    Function(_BASE, "KVConnectorWorkerMetadata.aggregate", ("self", "other")),
    Attributes(
        "distributed/kv_transfer/kv_connector/v1/metrics.py",
        "KVConnectorStats",
        ("data", "reset", "aggregate", "reduce", "is_empty"),
    ),
    Attributes(
        "distributed/kv_transfer/kv_connector/v1/metrics.py",
        "KVConnectorPromMetrics",
        ("_counter_cls", "per_engine_labelvalues", "observe"),
    ),
    Function("v1/core/kv_cache_manager.py", "KVCacheBlocks.get_block_ids", ("self",)),
    # The prefix cache, asked and added to
    Function(_BASE, "KVConnectorBase_V1.bind_kv_cache_manager", ("self", "kv_cache_manager")),
    Function(_BASE, "KVConnectorBase_V1.has_pending_push_work", ("self",)),
    Text(_SCHEDULER, "Scheduler.__init__", "self.connector.bind_kv_cache_manager(self.kv_cache_manager)"),
    Text(_SCHEDULER, "Scheduler.has_requests", "self.connector.has_pending_push_work()"),
    Attributes("v1/core/kv_cache_manager.py", "KVCacheManager", ("enable_caching", "block_pool")),
    Function("v1/core/kv_cache_manager.py", "KVCacheBlocks.get_block_ids", ("self",)),
    Function("v1/core/kv_cache_manager.py", "KVCacheManager.get_computed_blocks", ("self", "request")),
    Attributes("v1/core/block_pool.py", "BlockPool", ("null_block",)),
    Function("v1/core/block_pool.py", "BlockPool.get_num_free_blocks", ("self",)),
    Function("v1/core/block_pool.py", "BlockPool.get_new_blocks", ("self", "num_blocks")),
    Function("v1/core/block_pool.py", "BlockPool.free_blocks", ("self", "ordered_blocks")),
    Function(
        "v1/core/block_pool.py",
        "BlockPool.cache_full_blocks",
        (
            "self",
            "request",
            "blocks",
            "num_cached_blocks",
            "num_full_blocks",
            "block_size",
            "kv_cache_group_id",
        ),
    ),
    Attributes("v1/kv_cache_interface.py", "KVCacheConfig", ("kv_cache_groups", "hash_block_size")),
    Attributes("v1/outputs.py", "KVConnectorOutput", ("kv_connector_worker_meta",)),
    # What the scheduler does with the connector's answers
    Attributes("v1/core/sched/output.py", "SchedulerOutput", ("kv_connector_metadata", "total_num_scheduled_tokens")),
    Text(_SCHEDULER, "Scheduler.schedule", "if ext_tokens is None:"),
    Text(_SCHEDULER, "Scheduler.schedule", "delay_cache_blocks=load_kv_async"),
    Text(_SCHEDULER, "Scheduler._update_waiting_for_remote_kv", "self.kv_cache_manager.cache_blocks("),
    Text(_SCHEDULER, "Scheduler._update_from_kv_xfer_finished", "self.finished_recving_kv_req_ids.add(req_id)"),
    Text(_SCHEDULER, "Scheduler._handle_invalid_blocks", "self.failed_recving_kv_req_ids |= async_failed_req_ids"),
    Text(_SCHEDULER, "Scheduler._update_requests_with_invalid_blocks", "idx * self.block_size"),
    Text(_SCHEDULER, "Scheduler.add_request", "self.connector.on_new_request(request)"),
    Attributes(
        "v1/request.py",
        "Request",
        (
            "request_id",
            "kv_transfer_params",
            "prompt_token_ids",
            "num_prompt_tokens",
            "cache_salt",
            "block_hashes",
            "update_block_hashes",
            "mm_features",
            "prompt_embeds",
            "pooling_params",
            "resumable",
            "all_token_ids",
            "num_output_tokens",
            "prefill_stats",
            "status",
            "skip_reading_prefix_cache",
        ),
    ),
    Function(
        "v1/metrics/stats.py",
        "PrefillStats.set",
        ("self", "num_prompt_tokens", "num_local_cached_tokens", "num_external_cached_tokens"),
    ),
    Text("v1/core/kv_cache_utils.py", "get_request_block_hasher", "request.block_hashes[-1]"),
    Text("v1/core/kv_cache_utils.py", "generate_block_hash_extra_keys", "request.cache_salt"),
    # The engine in this process
    Function("v1/engine/llm_engine.py", "LLMEngine.from_engine_args", ("cls", "engine_args")),
    Function("v1/engine/llm_engine.py", "LLMEngine.add_request", ("self", "request_id", "prompt", "params")),
    Function("v1/engine/llm_engine.py", "LLMEngine.abort_request", ("self", "request_ids")),
    Function("v1/engine/llm_engine.py", "LLMEngine.step", ("self",)),
    Attributes("v1/engine/core_client.py", "InprocClient", ("engine_core", "shutdown")),
    Attributes("v1/engine/core.py", "EngineCore", ("scheduler",)),
    Attributes(_SCHEDULER, "Scheduler", ("connector",)),
)


def problems(source: Source) -> list[str]:
    """What is missing or different, one sentence each."""
    found = []
    for interface in INTERFACES:
        problem = interface.problem(source)
        if problem:
            found.append(f"vllm/{interface.path}: {interface.name} {problem}")
    return found


def installed_source() -> Source:
    """The installed vllm package. Raises `ModuleNotFoundError` where there is none."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("vllm is not installed")
    root = Path(spec.origin).parent

    def read(path: str) -> str | None:
        file = root / path
        return file.read_text() if file.is_file() else None

    return read


def wheel_source(wheel: Path) -> Source:
    """The vllm package in a wheel."""
    archive = zipfile.ZipFile(wheel)

    def read(path: str) -> str | None:
        try:
            return archive.read(f"vllm/{path}").decode()
        except KeyError:
            return None

    return read


def main(arguments: list[str]) -> int:
    """Check the installed vLLM, or the wheels named; the exit code."""
    missing = [name for name in arguments if not Path(name).is_file()]
    if missing:
        print(f"{missing[0]} is not there: name downloaded vLLM wheels, or none for the installed vLLM")
        return 2
    sources = {name: wheel_source(Path(name)) for name in arguments} or {"the installed vllm": installed_source()}
    failed = False
    for name, source in sources.items():
        found = problems(source)
        failed |= bool(found)
        print(f"{name}: {len(INTERFACES) - len(found)} of {len(INTERFACES)} interfaces are as expected")
        for problem in found:
            print(f"  {problem}")
    return int(failed)


def _find(source: Source, path: str, name: str) -> ast.AST | None:
    """The definition of `name`, `Class.method` for a method."""
    text = source(path)
    node: ast.AST | None = ast.parse(text) if text is not None else None
    for part in name.split("."):
        children = list(ast.walk(node)) if isinstance(node, ast.Module) else getattr(node, "body", [])
        node = next((child for child in children if getattr(child, "name", None) == part), None)
    return node


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
