"""Timelines as a trace for Perfetto (ui.perfetto.dev) and Chrome's tracing page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from triaxial.plan.pipeline.timeline import Timeline


def chrome_trace(named: Sequence[tuple[str, Timeline]]) -> dict[str, Any]:
    """Trace Event Format, as a value that `json.dumps` takes: each timeline a process, each rank a thread.

    All timelines begin at 0, so that they can be compared; times are in microseconds, as the format wants.
    """
    events: list[dict[str, Any]] = []
    for process, (name, timeline) in enumerate(named):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}})
        for rank, spans in enumerate(timeline.ranks):
            events.append(
                {"ph": "M", "name": "thread_name", "pid": process, "tid": rank, "args": {"name": f"rank {rank}"}}
            )
            for action, begin_s, end_s in spans:
                event = {
                    "ph": "X",
                    "name": str(action),
                    "cat": action.kind,
                    "pid": process,
                    "tid": rank,
                    "ts": (begin_s - timeline.begin_s) * 1e6,
                    "dur": (end_s - begin_s) * 1e6,
                    "args": {"stage": action.stage, "micro_batch": action.micro_batch},
                }
                events.append(event)
    return {"traceEvents": events, "displayTimeUnit": "ms"}
