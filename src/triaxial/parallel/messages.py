"""What passes between pipeline ranks: the messages of a table, and what carries them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from triaxial.parallel.mesh import CommunicationError
from triaxial.plan.pipeline.schedule import Action, Schedule


@dataclass(frozen=True)
class Message:
    """What one action hands to another: an activation forwards or a gradient backwards."""

    producer: Action
    consumer: Action
    source: int
    target: int
    """Pipeline ranks; one rank where it holds both stages."""
    sent_at: int
    """Place of the producer among the source's actions."""
    taken_at: int
    """Place of the consumer among the target's actions."""


class Transport(Protocol):
    """Carries the messages between this rank and others, of one run of the table after another."""

    def open_step(self, *, train: bool) -> None:
        """A run of the table begins, of all its actions or of the forward ones only."""

    def receive(self, message: Message) -> Tensor:
        """The next message that this rank's table takes."""

    def send(self, message: Message, y: Tensor) -> None:
        """The next message that this rank's table makes."""

    def close_step(self) -> None:
        """Every message that this rank has sent is on its way."""


def list_messages(schedule: Schedule) -> list[Message]:
    """Every message of the table, in each sender's order."""
    place, last = schedule.placement, schedule.num_stages - 1
    position = {action: i for actions in schedule.ranks for i, action in enumerate(actions)}
    takers = {(a.stage, a.micro_batch): a for a in position if a.kind in "BI"}
    messages = []
    for action in position:
        stage, micro_batch = action.stage, action.micro_batch
        if action.kind == "F" and stage < last:
            consumer = Action("F", stage + 1, micro_batch)
        elif action.kind in "BI" and stage > 0:
            consumer = takers[stage - 1, micro_batch]
        else:
            continue
        ranks = place[stage], place[consumer.stage]
        messages.append(Message(action, consumer, *ranks, position[action], position[consumer]))
    return messages


@contextmanager
def receiving(rank: int, message: Message) -> Iterator[None]:
    """Turn a failure into one that says which rank missed what from whom."""
    try:
        yield
    except RuntimeError as error:
        raise CommunicationError(
            f"rank {rank}: receiving the input of {message.consumer} from pipeline rank {message.source} failed: {error}"
        ) from error


@contextmanager
def sending(rank: int, message: Message) -> Iterator[None]:
    """Turn a failure into one that says which rank could not send what to whom."""
    try:
        yield
    except RuntimeError as error:
        raise CommunicationError(
            f"rank {rank}: sending the output of {message.producer} to pipeline rank {message.target} failed: {error}"
        ) from error
