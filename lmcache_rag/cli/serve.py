"""`lmcache-rag serve`: vLLM's own OpenAI server over a model or an index, set as our part of it needs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lmcache_rag.errors import CorpusError, EngineError
from lmcache_rag.request import INGEST_KEY
from lmcache_rag.terminal import CapacityOption, CodecOption, DtypeOption, ThreadsOption, TiersOption, err, given

if TYPE_CHECKING:
    from lmcache_rag.engine import EngineSettings

_OURS = ("--kv-transfer-config", "--worker-cls", "--model", "--host", "--port", "--api-server-count")
_MIDDLEWARE = "lmcache_rag.vllm.http.ReuseMiddleware"
_ANY_PARSER = "hermes"
"""vLLM takes no tools without a parser, not even forced calls, which every model can make."""


def serve(
    arguments: Annotated[
        Optional[list[str]],
        typer.Argument(
            metavar="[MODEL] [VLLM OPTIONS]", help="Hugging Face id or folder, and any option of vllm serve."
        ),
    ] = None,
    folder: Annotated[
        Optional[Path], typer.Option("--index", help="Serve the model, store and namespace of this index.")
    ] = None,
    store: Annotated[Optional[str], typer.Option(help="Folder or URI of the KV store.")] = None,
    namespace: Annotated[Optional[str], typer.Option(help="Whose KV.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    ingest_key: Annotated[
        Optional[str],
        typer.Option(envvar=INGEST_KEY, help="Clients that show this key may store KV. Better in the environment."),
    ] = None,
    clients_precompute: Annotated[
        bool, typer.Option("--clients-precompute", help="Let all clients store KV, which all requests then reuse.")
    ] = False,
    namespace_per_salt: Annotated[
        bool, typer.Option("--namespace-per-salt", help="Each cache_salt has a namespace of its own: tenants.")
    ] = False,
    clients_choose_namespace: Annotated[
        bool, typer.Option("--clients-choose-namespace", help="Let clients name any namespace of the store.")
    ] = False,
    learn_unsalted: Annotated[
        bool,
        typer.Option(
            "--learn-unsalted",
            help="Learn from requests without a cache_salt too: where all clients may know all prompts.",
        ),
    ] = False,
    tiers: TiersOption = None,
    capacity: CapacityOption = None,
    codec: CodecOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Serve a model, or that of an index, with vLLM's OpenAI server, which reuses what is stored in every prompt."""
    model, vllm_options = _split(arguments or [])
    connector = {
        "clients_precompute": clients_precompute or bool(ingest_key),
        "ingest_key": bool(ingest_key),
        "clients_choose_namespace": clients_choose_namespace,
        "namespace_per_salt": namespace_per_salt,
        "learn_unsalted": learn_unsalted,
    }
    if any(option.partition("=")[0] == "--tool-call-parser" for option in vllm_options):
        connector["offers_tools"] = True
    engine = given(
        model=model, store=store, namespace=namespace, capacity_bytes=capacity, codec=codec, dtype=dtype,
        threads=threads, tiers=tiers,
    )  # fmt: skip
    settings = settings_of(folder, **engine)
    command, environment = server_command(settings, connector)
    if ingest_key:
        environment[INGEST_KEY] = ingest_key
    command += ["--host", host, "--port", str(port), *vllm_options]
    err.print(
        f"Serving {settings.model} on http://{host}:{port}, with KV from {settings.store}",
        highlight=False,
        markup=False,
    )
    os.execve(sys.executable, command, {**os.environ, **environment})  # noqa: S606  # vLLM is this process from here on


def settings_of(folder: Path | None, **engine: Any) -> EngineSettings:
    """What to serve: an index, where one is named or no model is, else the model of the settings given.

    Raises:
        CorpusError: there is no such index, or it has a model of its own.
    """
    from lmcache_rag.corpus import Manifest
    from lmcache_rag.engine import EngineSettings
    from lmcache_rag.model import cache_folder

    if folder is None and "model" in engine:
        settings = EngineSettings.checked(**engine)
        if "store" in settings.model_fields_set:  # also by the environment
            return settings
        return EngineSettings.checked(**{**engine, "store": str(cache_folder() / "kv")})
    folder = (folder or Path(".lmcache-rag")).expanduser()
    manifest = Manifest.read(folder)
    if manifest is None:
        raise CorpusError(
            f"There is no index in {folder}: run `lmcache-rag index PATH... --index {folder}` first, "
            "or name a model to serve without one."
        )
    fixed = [name for name in ("model", "store", "namespace") if name in engine]
    if fixed:
        raise CorpusError(f"The index {folder} has a {fixed[0]} of its own: leave {fixed[0]} out, or --index.")
    own = {
        "model": manifest.model,
        "store": manifest.store_uri(folder.resolve()),
        "namespace": manifest.namespace,
        "codec": manifest.codec,
        "dtype": manifest.dtype,
    }
    return EngineSettings.checked(**{**own, **engine})


def server_command(
    settings: EngineSettings, connector: dict[str, Any] | None = None
) -> tuple[list[str], dict[str, str]]:
    """The command that serves with these settings, and what its environment needs.

    Args:
        connector: further fields of `ConnectorConfig`.

    Raises:
        EngineError: vLLM is missing.
        ModelError: the model cannot be found.
    """
    from lmcache_rag.engine.start import engine_arguments, runs_on_cpu
    from lmcache_rag.engine.tools import tool_parser_of
    from lmcache_rag.model import chat_template, resolve_model

    on_cpu = runs_on_cpu()
    model_folder = resolve_model(settings.model)
    parser = settings.tool_parser or tool_parser_of(chat_template(model_folder))
    connector = {"offers_tools": parser is not None, **(connector or {})}
    arguments = engine_arguments(settings, model_folder, connector, on_cpu=on_cpu)
    if "max_num_seqs" not in settings.model_fields_set:
        del arguments["max_num_seqs"]  # vLLM knows how many a server can have
    arguments |= {
        "served_model_name": settings.model,
        "middleware": _MIDDLEWARE,
        "enable_prompt_tokens_details": True,
        "enable_auto_tool_choice": True,
        "tool_call_parser": parser or _ANY_PARSER,
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]  # `vllm serve` fails in vLLM's CPU build
    for name, value in arguments.items():
        command += _flag(name, value)
    cores = sorted(os.sched_getaffinity(0))[: settings.threads]
    bound = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))} if on_cpu else {}  # else vLLM leaves some idle
    return command, {name: value for name, value in bound.items() if name not in os.environ}


def _split(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The model, if one is named, and vLLM's options. Raises `EngineError` where one of these is ours."""
    model, options = (
        (arguments[0], arguments[1:]) if arguments and not arguments[0].startswith("-") else (None, arguments)
    )
    for option in filter(_is_ours, options):
        raise EngineError(f"{option.partition('=')[0]} is set by lmcache-rag itself: leave it out.")
    return model, options


def _is_ours(option: str) -> bool:
    """Whether vLLM takes this for one of ours: it also takes an option's beginning, and parts of one behind a dot."""
    name = option.partition("=")[0].partition(".")[0].replace("_", "-")
    return name.startswith("--") and name != "--" and any(ours.startswith(name) for ours in _OURS)


def _flag(name: str, value: Any) -> list[str]:
    """An engine argument as vLLM's command line takes it."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    return [f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value)]
