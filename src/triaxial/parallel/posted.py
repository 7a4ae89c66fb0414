"""Messages between pipeline ranks through the backend, Gloo or NCCL.

Those between two ranks travel on one channel per pair and direction, in the order in which the sender's table produces
them; receives are posted in that same order, one message ahead, so that data moves while ranks compute.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor

from triaxial.parallel.mesh import Axis, open_group
from triaxial.parallel.messages import Message, receiving, sending
from triaxial.plan.pipeline.schedule import Action

_Channel = tuple[int, int, bool]
"""Pipeline ranks of the source and the target, and whether forwards."""


class PostedMessages:
    """One rank's messages on process groups of two."""

    def __init__(self, messages: Sequence[Message], axis: Axis, empty: Callable[[], Tensor]) -> None:
        """Open the channels of the table; every rank of the axis must do so.

        Args:
            messages: those between different ranks, in each sender's order.
            empty: makes a buffer to receive into.
        """
        self._axis, self._empty, self._here = axis, empty, axis.ranks[axis.index]
        self._channels: dict[_Channel, list[Message]] = defaultdict(list)
        for message in messages:
            self._channels[_channel(message)].append(message)
        self._incoming = sorted((m for m in messages if m.target == axis.index), key=lambda m: m.taken_at)
        self._groups = {
            (source, target, forward): open_group((axis.ranks[source], axis.ranks[target]), self._here, axis.timeout)
            for source, target, forward in sorted(self._channels)
        }

    def open_step(self, *, train: bool) -> None:
        """Post the first receive."""
        self._to_post = {
            channel: deque(m for m in order if train or m.producer.kind == "F")
            for channel, order in self._channels.items()
        }
        self._posted: dict[Action, tuple[dist.Work, Tensor]] = {}
        self._sent: dict[int, deque[tuple[Message, dist.Work, Tensor]]] = defaultdict(deque)
        self._coming = deque(m for m in self._incoming if train or m.producer.kind == "F")
        self._post_next()

    def _post_next(self) -> None:
        """Post the receive that this rank's table needs next, after those that its channel delivers before."""
        if not self._coming:
            return
        channel = _channel(self._coming[0])
        while self._coming[0].consumer not in self._posted:
            message, buffer = self._to_post[channel].popleft(), self._empty()
            with receiving(self._here, message):
                work = self._groups[channel].recv([buffer], self._index_in_pair(message.source), 0)
            self._posted[message.consumer] = work, buffer

    def receive(self, message: Message) -> Tensor:
        self._coming.popleft()
        self._post_next()
        work, buffer = self._posted.pop(message.consumer)
        with receiving(self._here, message):
            work.wait()
        self._forget_delivered(message)
        return buffer

    def send(self, message: Message, y: Tensor) -> None:
        y = y.contiguous()
        with sending(self._here, message):
            work = self._groups[_channel(message)].send([y], self._index_in_pair(message.target), 0)
        self._sent[message.target].append((message, work, y))

    def close_step(self) -> None:
        for sent in self._sent.values():
            while sent:
                self._finish(sent)

    def _forget_delivered(self, message: Message) -> None:
        """A message from a rank proves that what it consumed earlier has arrived: those buffers can go."""
        sent = self._sent[message.source]
        while sent and sent[0][0].taken_at < message.sent_at:
            self._finish(sent)

    def _finish(self, sent: deque[tuple[Message, dist.Work, Tensor]]) -> None:
        message, work, _ = sent.popleft()
        with sending(self._here, message):
            work.wait()

    def _index_in_pair(self, pipeline_rank: int) -> int:
        """The group's own calls save a quarter of what `dist.isend` and `dist.irecv` cost, and count members in order."""
        return int(self._axis.ranks[pipeline_rank] > self._here)


def _channel(message: Message) -> _Channel:
    return message.source, message.target, message.producer.kind == "F"
