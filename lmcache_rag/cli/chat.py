"""`lmcache-rag chat`: a conversation over an index, with one engine."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from lmcache_rag.cli.ask import as_row, show_end, warm_up
from lmcache_rag.cli.start import asked
from lmcache_rag.errors import PromptError
from lmcache_rag.request import DEFAULT_SELECTOR, DEFAULT_TARGET_KL, BlendOptions
from lmcache_rag.terminal import (
    DEFAULT_INDEX,
    DtypeOption,
    IndexOption,
    MaxTokensOption,
    ModelOption,
    PassagesOption,
    RatioOption,
    SelectorOption,
    ServerOption,
    TargetKLOption,
    ThreadsOption,
    TiersOption,
    err,
    given,
    out,
)

if TYPE_CHECKING:
    from lmcache_rag.corpus import Conversation
    from lmcache_rag.engine import Engine, Sampling


def chat(
    folder: IndexOption = DEFAULT_INDEX,
    server: ServerOption = None,
    model: ModelOption = None,
    passages: PassagesOption = 5,
    selector: SelectorOption = DEFAULT_SELECTOR,
    target_kl: TargetKLOption = DEFAULT_TARGET_KL,
    ratio: RatioOption = None,
    max_tokens: MaxTokensOption = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each answer.")] = False,
    tiers: TiersOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Answer questions one after another, a line each, from the indexed documents and what was said before. Ctrl-C ends
    an answer, Ctrl-D the conversation."""
    from lmcache_rag.corpus import Conversation, IndexSettings
    from lmcache_rag.engine import Sampling

    options = BlendOptions.checked(selector=selector, target_kl=target_kl, ratio=ratio)
    settings, engine_options = IndexSettings.checked(model=model), given(dtype=dtype, threads=threads, tiers=tiers)
    with asked(server, folder, settings, **engine_options) as (engine, corpus):
        form = corpus.manifest.prompt
        if server is None:
            warm_up(engine, form.question_ids(engine.tokenizer, "What is this?"))
        sampling = Sampling(max_tokens=max_tokens, stop=form.stop)
        conversation = Conversation(corpus, engine.tokenizer, engine.max_model_len - max_tokens, passages)
        for question in _questions():
            try:
                _answer(engine, conversation, question, sampling, options, as_json=as_json)
            except PromptError as error:
                err.problem("error:", str(error))


def _questions() -> Iterator[str]:
    """Lines that are not empty, with the editing keys of a shell where somebody types them."""
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):  # some builds of Python have none
            import readline  # noqa: F401
    elif hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input("> " if typed else "")
        except EOFError:
            return
        except KeyboardInterrupt:  # as in a shell: the line is dropped
            out.print("")
            continue
        if line.strip():
            yield line.strip()


def _answer(
    engine: Engine,
    conversation: Conversation,
    question: str,
    sampling: Sampling,
    options: BlendOptions,
    *,
    as_json: bool,
) -> None:
    remembered = len(conversation)
    try:
        prompt, hits = conversation.ask(question)
    except KeyboardInterrupt:
        out.print("\n")
        return
    if len(conversation) <= remembered:
        err.print(f"The conversation is too long for the model: {remembered + 1 - len(conversation)} turns forgotten")
    text = ""
    try:
        for delta in engine.stream(prompt, sampling, options):
            text += delta.text
            if not as_json:
                out.print(delta.text, end="")
            answer = delta.completion
    except PromptError:
        conversation.forget()
        raise
    except KeyboardInterrupt:
        conversation.answered(text)
        out.print("\n")
        return
    assert answer is not None
    conversation.answered(answer.text, answer.token_ids)
    if as_json:
        print(json.dumps({"question": question, **as_row(answer, hits)}), flush=True)
    else:
        show_end(answer, hits)
