"""Reuse reports of requests, where vLLM's API server runs: streams, and answers that a stop string ends, carry none.

They come with the statistics that vLLM passes from its engine's process to the API server after each step, and so as
soon as a prompt's blend is done; see `metrics`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

_KEPT = 4096
_SUFFIX = len("-12345678")
"""What vLLM's engine adds to the id that the API server knows a request by."""

_reports: OrderedDict[str, dict[str, Any]] = OrderedDict()


def note(reports: Mapping[str, dict[str, Any]]) -> None:
    """Keep reports by the engine's ids of their requests, in the place of earlier ones."""
    for request_id, report in reports.items():
        name = request_id[:-_SUFFIX]
        _reports[name] = report
        _reports.move_to_end(name)
    while len(_reports) > _KEPT:
        _reports.popitem(last=False)


def report_of(answer_id: str) -> dict[str, Any] | None:
    """The report of the answer with this id in the API; of several answers to one request, of the first."""
    names = (answer_id, f"{answer_id}-0", f"0_{answer_id}", f"0_{answer_id}-0")
    return next((_reports[name] for name in names if name in _reports), None)
