"""The pipeline axis: executes any valid schedule table and times every action.

Messages between two ranks travel on one channel per pair and direction, in the order in which the sender's table
produces them; receives are posted in that same order, one action ahead, so that data moves while ranks compute.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from triaxial.parallel.mesh import Axis, CommunicationError, open_group
from triaxial.parallel.stage import Work
from triaxial.plan.pipeline.schedule import Action, Schedule
from triaxial.plan.pipeline.timeline import Span
from triaxial.plan.pipeline.validity import check_schedule


@dataclass(frozen=True)
class _Message:
    """What one action sends to another: an activation forwards or a gradient backwards."""

    producer: Action
    consumer: Action
    source: int
    target: int
    """Pipeline ranks."""

    @property
    def channel(self) -> tuple[int, int, bool]:
        return self.source, self.target, self.producer.kind == "F"


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
    ) -> None:
        """Open the channels of the table; every rank of the axis must do so.

        Args:
            stages: this rank's virtual stages by number.
            message_shape: of the activations between stages.

        Raises:
            BadInput: a table that cannot run.
        """
        check_schedule(schedule)
        self._schedule, self._axis, self._stages = schedule, axis, stages
        self._empty: Callable[[], Tensor] = lambda: torch.empty(message_shape, dtype=dtype, device=device)
        self._clock: _Clock = _CudaClock() if device.type == "cuda" else _HostClock()
        self._actions = schedule.ranks[axis.index]
        self._forward_only = tuple(action for action in self._actions if action.kind == "F")
        self._last_of_stage = {action.stage: action for action in self._actions if action.kind in "BW"}
        self._plan_messages()

    def _plan_messages(self) -> None:
        messages = _messages(self._schedule)
        me = self._axis.index
        self._incoming = {m.consumer: m for m in messages if m.target == me}
        self._outgoing = {m.producer: m for m in messages if m.source == me}
        self._order: dict[tuple[int, int, bool], list[_Message]] = defaultdict(list)
        for message in messages:  # in each sender's order
            self._order[message.channel].append(message)
        ranks, here = self._axis.ranks, self._axis.ranks[self._axis.index]
        self._groups = {
            (source, target, forward): open_group((ranks[source], ranks[target]), here, self._axis.timeout)
            for source, target, forward in sorted(self._order)
            if source != target
        }
        self._position = {action: i for actions in self._schedule.ranks for i, action in enumerate(actions)}

    def run(self, *, train: bool = True) -> list[Span]:
        """Run the table once (only its forward actions unless `train`).

        Returns:
            Begin and end of every action, in seconds of this rank's clock.

        Raises:
            CommunicationError: a message did not arrive; names rank, action and the peer.
        """
        actions = self._actions if train else self._forward_only
        step = _Step(self, train)
        marks = []
        for i, action in enumerate(actions):
            for coming in actions[i : i + 2]:
                step.expect(coming)
            x = step.receive(action)
            begin = self._clock.now()
            y = self._execute(action, x, train)
            marks.append((begin, self._clock.now()))
            if y is not None:
                step.send(action, y)
        step.close()
        return [Span(a, *self._clock.seconds(begin, end)) for a, (begin, end) in zip(actions, marks, strict=True)]

    def _execute(self, action: Action, x: Tensor | None, train: bool) -> Tensor | None:
        stage = self._stages[action.stage]
        last = self._last_of_stage.get(action.stage) == action
        match action.kind:
            case "F":
                return stage.forward(action.micro_batch, x, train=train)
            case "B":
                return stage.backward(action.micro_batch, x, last=last)
            case "I":
                return stage.backward_input(action.micro_batch, x)
            case "W":
                stage.backward_weight(action.micro_batch, last=last)
                return None


class _Step:
    """The messages of one run of the table."""

    def __init__(self, pipeline: Pipeline, train: bool) -> None:
        self._pipeline = pipeline
        self._to_post = {
            channel: deque(m for m in order if m.target == pipeline._axis.index and (train or m.producer.kind == "F"))
            for channel, order in pipeline._order.items()
        }
        self._posted: dict[Action, tuple[dist.Work, Tensor]] = {}
        self._kept: dict[Action, Tensor] = {}
        self._sent: dict[int, deque[tuple[_Message, dist.Work, Tensor]]] = defaultdict(deque)

    def expect(self, action: Action) -> None:
        """Post the receive that `action` needs, after those that its channel delivers before."""
        pipeline = self._pipeline
        message = pipeline._incoming.get(action)
        if message is None or message.source == message.target:
            return
        waiting = self._to_post[message.channel]
        while action not in self._posted and waiting:
            following = waiting.popleft()
            buffer = pipeline._empty()
            source, here = pipeline._axis.ranks[following.source], pipeline._axis.ranks[following.target]
            with self._naming(_receiving(following)):
                work = pipeline._groups[following.channel].recv([buffer], _index_in_pair(source, here), 0)
            self._posted[following.consumer] = work, buffer

    def receive(self, action: Action) -> Tensor | None:
        """The message that `action` consumes; None at the two ends of the pipeline."""
        pipeline = self._pipeline
        message = pipeline._incoming.get(action)
        if message is None:
            return None
        if message.source == message.target:
            return self._kept.pop(action)
        work, buffer = self._posted.pop(action)
        with self._naming(_receiving(message)):
            work.wait()
        self._forget_delivered(message)
        return buffer

    def send(self, action: Action, y: Tensor) -> None:
        """Hand what `action` made to the action that consumes it."""
        pipeline = self._pipeline
        message = pipeline._outgoing.get(action)
        if message is None:
            return
        if message.source == message.target:
            self._kept[message.consumer] = y
            return
        target, here = pipeline._axis.ranks[message.target], pipeline._axis.ranks[message.source]
        y = y.contiguous()
        pipeline._axis.traffic["send"] += y.numel() * y.element_size()
        with self._naming(_sending(message)):
            work = pipeline._groups[message.channel].send([y], _index_in_pair(target, here), 0)
        self._sent[message.target].append((message, work, y))

    def close(self) -> None:
        """Every message of this rank has left it."""
        for sent in self._sent.values():
            for message, work, _ in sent:
                with self._naming(_sending(message)):
                    work.wait()

    def _forget_delivered(self, message: _Message) -> None:
        """A message from a rank proves that what it consumed earlier has arrived: those buffers can go."""
        sent, position = self._sent[message.source], self._pipeline._position
        while sent and position[sent[0][0].consumer] < position[message.producer]:
            done, work, _ = sent.popleft()
            with self._naming(_sending(done)):
                work.wait()

    @contextmanager
    def _naming(self, what: str) -> Iterator[None]:
        """Turn a backend's error into one that says which rank did what with whom."""
        try:
            yield
        except RuntimeError as error:
            axis = self._pipeline._axis
            raise CommunicationError(f"rank {axis.ranks[axis.index]}: {what} failed: {error}") from error


def _index_in_pair(rank: int, other: int) -> int:
    """The group's own calls save a quarter of what `dist.isend` and `dist.irecv` cost, and count members in order."""
    return int(rank > other)


def _receiving(message: _Message) -> str:
    return f"receiving the input of {message.consumer} from pipeline rank {message.source}"


def _sending(message: _Message) -> str:
    return f"sending the output of {message.producer} to pipeline rank {message.target}"


def _messages(schedule: Schedule) -> list[_Message]:
    """Every message of the table, in each sender's order."""
    place, last = schedule.placement, schedule.num_stages - 1
    takers = {(a.stage, a.micro_batch): a for actions in schedule.ranks for a in actions if a.kind in "BI"}
    messages = []
    for actions in schedule.ranks:
        for action in actions:
            stage, micro_batch = action.stage, action.micro_batch
            if action.kind == "F" and stage < last:
                consumer = Action("F", stage + 1, micro_batch)
            elif action.kind in "BI" and stage > 0:
                consumer = takers[stage - 1, micro_batch]
            else:
                continue
            messages.append(_Message(action, consumer, place[stage], place[consumer.stage]))
    return messages


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
