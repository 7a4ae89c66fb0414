"""Processor seconds of a server: told apart by hand, and of a real one."""

from __future__ import annotations

import pytest

from triaxial.cluster.timings import ServerTimings
from triaxial.measure import probe_server
from triaxial.measure.probe_server import ANSWER_TOKENS, processor_seconds, server_timings


def test_steps_and_their_sequences_are_told_apart() -> None:
    request, step, sequence, steps = 3e-3, 4e-4, 7e-5, ANSWER_TOKENS - 1
    one, eight = (n * request + steps * (step + n * sequence) for n in (1, 8))
    found = processor_seconds(request, one, eight, 8)
    assert found.request_s == request
    assert (found.step_s, found.sequence_s) == (pytest.approx(step), pytest.approx(sequence))


def test_what_a_clock_cannot_tell_is_nothing() -> None:
    assert processor_seconds(0.0, 0.0, 0.0, 8) == ServerTimings(request_s=0.0, step_s=0.0, sequence_s=0.0)
    assert processor_seconds(1e-3, 0.1, 0.05, 8).sequence_s == 0.0


def test_what_counts_elsewhere_is_left_out_but_no_more() -> None:
    server = ServerTimings(request_s=3e-3, step_s=4e-4, sequence_s=7e-5).beyond(1e-4, 1e-3)
    assert (server.request_s, server.step_s, server.sequence_s) == (3e-3, pytest.approx(3e-4), 0.0)


def test_a_server_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_server, "_MODEL", {"num_hidden_layers": 1})
    monkeypatch.setattr(probe_server, "ANSWER_TOKENS", 9)
    found = server_timings("fp32", 3, 0.0, 0.0)
    assert found is not None
    assert 0 < found.request_s < 1
    assert found.step_s + found.sequence_s > 0
