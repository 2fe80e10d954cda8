"""The command line: `lmcache-rag index`, `ask`, `chat`, `serve`, `store`, `calibrate`, `plan` and `bench`."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from lmcache_rag import __version__
from lmcache_rag.bench import (  # noqa: F401  # add their commands to the others
    application_commands,
    report_commands,
    serving_commands,
    store_commands,
)
from lmcache_rag.bench.commands import bench_app, calibrate
from lmcache_rag.cli.ask import ask
from lmcache_rag.cli.chat import chat
from lmcache_rag.cli.index import index
from lmcache_rag.cli.plan import plan
from lmcache_rag.cli.serve import serve
from lmcache_rag.corpus import commands  # noqa: F401  # the same
from lmcache_rag.errors import LmcacheRagError
from lmcache_rag.library.commands import store_app
from lmcache_rag.terminal import encode_anything, err, out

_EXTRAS = {
    **dict.fromkeys(("lmcache_rag_kernels", "safetensors", "torch", "vllm"), "`cpu` or `cuda`"),
    **dict.fromkeys(("faiss", "langchain_text_splitters", "sentence_transformers"), "`local`"),
}
"""The packages that commands import, and which extra has them. Others say so where they are used."""

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="RAG on vLLM in which the model reads each document once."
)
app.command()(index)
app.command()(ask)
app.command()(chat)
app.command(context_settings={"ignore_unknown_options": True})(serve)
app.command()(calibrate)
app.command()(plan)
app.add_typer(bench_app, name="bench")
app.add_typer(store_app, name="store")


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    encode_anything()
    if version:
        out.print(f"lmcache-rag {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: an error that the user can mend is one sentence and exit code 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app(standalone_mode=True)
    except LmcacheRagError as error:
        err.problem("error:", str(error))
        sys.exit(1)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        err.problem("error:", f"The package {error.name} is missing: install the extra {extra}.")
        sys.exit(1)
