"""Copies of components that hold an engine."""

from __future__ import annotations

import pickle
from typing import Any

from llama_index.core.bridge.pydantic import BaseModel


class Copyable:
    """Makes a LlamaIndex component that is pickled with its engine, or not at all: on their own, these leave out what
    cannot be pickled. To be named before the component among the base classes.

    Raises:
        EngineError: when pickled: the engine runs in this process.
    """

    __pydantic_private__: dict[str, Any] | None

    def __getstate__(self) -> Any:
        pickle.dumps(self.__pydantic_private__)
        return super().__getstate__()

    def __setstate__(self, state: Any) -> None:
        BaseModel.__setstate__(self, state)  # type: ignore[arg-type]
