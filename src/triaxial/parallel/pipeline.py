"""The pipeline axis: executes any valid schedule table and times every action."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from triaxial.parallel.host import Peers
from triaxial.parallel.mailbox import Mailbox
from triaxial.parallel.mesh import Axis
from triaxial.parallel.messages import Message, Transport, list_messages
from triaxial.parallel.posted import PostedMessages
from triaxial.parallel.stage import Work
from triaxial.plan.pipeline.schedule import Action, Schedule
from triaxial.plan.pipeline.timeline import Span
from triaxial.plan.pipeline.validity import check_schedule


class _Turn(NamedTuple):
    """An action of this rank, with what it takes and what it hands on."""

    action: Action
    incoming: Message | None
    outgoing: Message | None
    last: bool
    """Whether it completes the gradients of its stage."""


class Pipeline:
    """Executes one schedule on one rank of the pipeline axis."""

    def __init__(
        self,
        schedule: Schedule,
        axis: Axis,
        stages: Mapping[int, Work],
        *,
        message_shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        holders: Axis | None = None,
    ) -> None:
        """Open the channels of the table; every rank of the axis must do so.

        Args:
            stages: this rank's virtual stages by number.
            message_shape: of the activations between stages.
            holders: ranks that hold the same messages. On one host, they send each its part of those to other hosts,
                where the receivers gather them (arXiv 2104.04473, section 4.1).

        Raises:
            BadInput: a table that cannot run.
        """
        check_schedule(schedule)
        self._axis, self._stages = axis, stages
        self._clock: _Clock = _CudaClock() if device.type == "cuda" else _HostClock()
        messages = list_messages(schedule)
        incoming = {message.consumer: message for message in messages}
        outgoing = {message.producer: message for message in messages}
        actions = schedule.ranks[axis.index]
        last_of_stage = {action.stage: action for action in actions if action.kind in "BW"}
        self._turns = [_Turn(a, incoming.get(a), outgoing.get(a), a == last_of_stage[a.stage]) for a in actions]
        self._kept: dict[Action, Tensor] = {}
        """What one stage of this rank hands to another, by its consumer."""
        between_ranks = [message for message in messages if message.source != message.target]
        self._shape, self._holders = message_shape, holders if _send_parts(holders, axis, message_shape) else None
        if self._holders is not None:
            message_shape = (math.prod(message_shape) // self._holders.size,)
        self._transport = _open_transport(between_ranks, axis, message_shape, dtype, device)

    def run(self, *, train: bool = True) -> list[Span]:
        """Run the table once (only its forward actions unless `train`).

        Returns:
            Begin and end of every action, in seconds of this rank's clock.

        Raises:
            CommunicationError: a message did not arrive; names rank, action and the peer.
        """
        self._kept.clear()
        self._transport.open_step(train=train)
        marks = []
        for turn in self._turns:
            if not train and turn.action.kind != "F":
                continue
            x = self._receive(turn.incoming)
            begin = self._clock.now()
            y = self._execute(turn, x, train)
            marks.append((turn.action, begin, self._clock.now()))
            if y is not None:
                self._send(turn.outgoing, y)
        self._transport.close_step()
        return [Span(action, *self._clock.seconds(begin, end)) for action, begin, end in marks]

    def _receive(self, message: Message | None) -> Tensor | None:
        """What an action consumes; None at the two ends of the pipeline."""
        if message is None:
            return None
        if message.source == message.target:
            return self._kept.pop(message.consumer)
        x = self._transport.receive(message)
        return x if self._holders is None else self._holders.all_gather(x).view(self._shape)

    def _send(self, message: Message | None, y: Tensor) -> None:
        """Hand what an action made to the action that consumes it, if there is one."""
        if message is None:
            return
        if message.source == message.target:
            self._kept[message.consumer] = y
            return
        if self._holders is not None:
            y = y.reshape(self._holders.size, -1)[self._holders.index]
        self._axis.traffic["send"] += y.numel() * y.element_size()
        self._transport.send(message, y)

    def _execute(self, turn: _Turn, x: Tensor | None, train: bool) -> Tensor | None:
        kind, stage, micro_batch = turn.action
        work = self._stages[stage]
        match kind:
            case "F":
                return work.forward(micro_batch, x, train=train)
            case "B":
                return work.backward(micro_batch, x, last=turn.last)
            case "I":
                return work.backward_input(micro_batch, x)
            case "W":
                work.backward_weight(micro_batch, last=turn.last)
                return None


def _send_parts(holders: Axis | None, axis: Axis, shape: tuple[int, ...]) -> bool:
    """Whether parts save time on the way between hosts, and can be cut."""
    if holders is None or holders.size == 1 or not holders.one_host or axis.one_host:
        return False
    return math.prod(shape) % holders.size == 0


def _open_transport(
    messages: list[Message], axis: Axis, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Transport:
    """Shared memory where the whole pipeline is on one host, else the backend."""
    if axis.shared is not None and axis.group is not None:
        num_slots = Counter((message.source, message.target) for message in messages)
        return Mailbox(Peers(axis.group, axis.ranks, axis.index, axis.timeout), num_slots, shape, dtype)
    return PostedMessages(messages, axis, lambda: torch.empty(shape, dtype=dtype, device=device))


class _Clock(Protocol):
    def now(self) -> Any: ...
    def seconds(self, begin: Any, end: Any) -> tuple[float, float]: ...


class _HostClock:
    """Host time: actions on a CPU are over when they return."""

    def now(self) -> float:
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> tuple[float, float]:
        return begin, end


class _CudaClock:
    """Events in the stream, so that timing an action does not wait for it."""

    def __init__(self) -> None:
        self._origin = torch.cuda.Event(enable_timing=True)
        self._origin.record()
        self._origin_s = time.perf_counter()

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> tuple[float, float]:
        end.synchronize()
        first, last = (self._origin_s + self._origin.elapsed_time(mark) / 1e3 for mark in (begin, end))
        return first, last
