"""`lmcache-rag serve`: vLLM's own OpenAI server over an index, set as the index needs it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from lmcache_rag.errors import CorpusError
from lmcache_rag.terminal import CapacityOption, ThreadsOption, TiersOption, err, given


def serve(
    folder: Annotated[Path, typer.Option("--index", help="Folder of the index.")] = Path(".lmcache-rag"),
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    clients_precompute: Annotated[
        bool, typer.Option("--clients-precompute", help="Let clients store KV, which all requests then reuse.")
    ] = False,
    namespace_per_salt: Annotated[
        bool, typer.Option("--namespace-per-salt", help="Each cache_salt has a namespace of its own: tenants.")
    ] = False,
    clients_choose_namespace: Annotated[
        bool, typer.Option("--clients-choose-namespace", help="Let clients name any namespace of the store.")
    ] = False,
    tiers: TiersOption = None,
    capacity: CapacityOption = None,
    threads: ThreadsOption = None,
    vllm_arguments: Annotated[
        Optional[list[str]], typer.Argument(metavar="VLLM ARGUMENTS", help="Behind --: passed on to vLLM's server.")
    ] = None,
) -> None:
    """Serve an index's model with vLLM's OpenAI server, which reuses the index's passages in every prompt."""
    connector = {
        "clients_precompute": clients_precompute,
        "clients_choose_namespace": clients_choose_namespace,
        "namespace_per_salt": namespace_per_salt,
    }
    engine = given(capacity_bytes=capacity, threads=threads, tiers=tiers)
    command, environment = server_command(folder, connector, **engine)
    command += ["--host", host, "--port", str(port), *(vllm_arguments or ())]
    err.print(f"Serving the index {folder} on http://{host}:{port}", highlight=False, markup=False)
    os.execve(sys.executable, command, {**os.environ, **environment})  # noqa: S606  # vLLM is this process from here on


def server_command(
    folder: Path, connector: dict[str, Any] | None = None, **engine: Any
) -> tuple[list[str], dict[str, str]]:
    """The command that serves the index in `folder`, and what its environment needs.

    Args:
        connector: further fields of `ConnectorConfig`.
        engine: further fields of `EngineSettings`.

    Raises:
        CorpusError: there is no index.
        EngineError: vLLM is missing.
        ModelError: the index's model cannot be found.
    """
    from lmcache_rag.corpus import Manifest
    from lmcache_rag.engine import EngineSettings
    from lmcache_rag.engine.start import engine_arguments, runs_on_cpu
    from lmcache_rag.model import resolve_model

    folder = folder.expanduser()
    manifest = Manifest.read(folder)
    if manifest is None:
        raise CorpusError(f"There is no index in {folder}: run `lmcache-rag index PATH... --index {folder}` first.")
    settings = EngineSettings.checked(
        model=manifest.model,
        store=manifest.store_uri(folder.resolve()),
        namespace=manifest.namespace,
        codec=manifest.codec,
        dtype=manifest.dtype,
        **engine,
    )
    on_cpu = runs_on_cpu()
    arguments = engine_arguments(settings, resolve_model(manifest.model), connector or {}, on_cpu=on_cpu)
    arguments["served_model_name"] = manifest.model
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in arguments.items():
        command += _flag(name, value)
    cores = sorted(os.sched_getaffinity(0))[: settings.threads]
    bound = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))} if on_cpu else {}  # else vLLM leaves some idle
    return command, {name: value for name, value in bound.items() if name not in os.environ}


def _flag(name: str, value: Any) -> list[str]:
    """An engine argument as vLLM's command line takes it."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    return [f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value)]
