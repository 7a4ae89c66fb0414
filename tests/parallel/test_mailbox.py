"""Messages through shared memory: what arrives is what was sent, however far ahead or out of order, and a lost peer is
named."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tests.world import World
from triaxial.parallel.host import Peers
from triaxial.parallel.mailbox import Mailbox
from triaxial.parallel.mesh import CommunicationError
from triaxial.parallel.messages import Message
from triaxial.plan.pipeline.action import Action

SHAPE = (3, 5)


def message(number: int, source: int = 0) -> Message:
    return Message(Action("F", 0, number), Action("F", 1, number), source, 1 - source, number, number)


def mailbox(rank: int, num_slots: int, timeout_s: float = 60, dtype: torch.dtype = torch.bfloat16) -> Mailbox:
    peers = Peers(dist.group.WORLD, (0, 1), rank, timedelta(seconds=timeout_s))
    return Mailbox(peers, {(0, 1): num_slots, (1, 0): num_slots}, SHAPE, dtype)


def content(number: int) -> torch.Tensor:
    return torch.arange(15, dtype=torch.bfloat16).view(SHAPE) + number


def exchange_out_of_order(rank: int) -> tuple[bool, list[bool]]:
    """The sender's buffer changes after each send, the receiver takes the last first and keeps all; then once more."""
    box, rounds = mailbox(rank, 3), []
    for _ in range(2):
        if rank == 0:
            buffer = torch.empty(*reversed(SHAPE), dtype=torch.bfloat16).t()  # not contiguous
            for number in range(3):
                box.send(message(number), buffer.copy_(content(number)))
        else:
            received = {number: box.receive(message(number)) for number in (2, 0, 1)}
            received[0] += 1  # it is the receiver's own
            expected = {0: content(1), 1: content(1), 2: content(2)}
            rounds.append(all(torch.equal(received[number], expected[number]) for number in received))
            del received
    return rank == 0, rounds


def test_messages_arrive_whole_in_any_order_step_after_step(world: World) -> None:
    assert world.run(2, exchange_out_of_order) == [(True, []), (False, [True, True])]


def run_far_ahead(rank: int) -> float:
    """More notes than a socket's buffer holds, from both ranks at once, before either reads any; two steps of it."""
    count, total = 2000, 0.0
    box = mailbox(rank, count)
    for _ in range(2):
        for number in range(count):
            box.send(message(number, rank), content(number % 7))
        for number in range(count):
            total += float(box.receive(message(number, 1 - rank))[0, 0])
    return total


def test_two_ranks_may_both_send_thousands_of_messages_before_they_receive(world: World) -> None:
    assert world.run(2, run_far_ahead) == [2.0 * sum(number % 7 for number in range(2000))] * 2


def keep_views(rank: int) -> list[float]:
    """A slot in use, by however indirect a view, is not written over."""
    box = mailbox(rank, 1, dtype=torch.float64)
    if rank == 0:
        for number in range(3):
            box.send(message(number), torch.full(SHAPE, float(number), dtype=torch.float64))
        return []
    seen = []
    for number in range(3):
        view = box.receive(message(number))[1:].t()[2].requires_grad_()
        product = (view * view).sum()
        time.sleep(0.2)
        product.backward()
        seen.append(float(view.grad[0]))
        del view, product
    return seen


def test_a_message_stays_as_long_as_anything_refers_to_it(world: World) -> None:
    assert world.run(2, keep_views)[1] == [0.0, 2.0, 4.0]


def fail(rank: int, deserter: str) -> tuple[str, float]:
    """Rank 0 goes away or sleeps; rank 1 waits for a message of it, or for a slot."""
    box = mailbox(rank, 1, timeout_s=60 if deserter == "ends" else 1)
    if rank == 0:
        box.send(message(0), content(0))
        if deserter == "sleeps":
            time.sleep(3)
        return "", 0.0
    box.receive(message(0))  # what a rank sent before it ended is still there
    began = time.monotonic()
    try:
        box.receive(message(1))
    except CommunicationError as error:
        return str(error), time.monotonic() - began
    return "arrived", 0.0


@pytest.mark.parametrize(
    ("deserter", "cause"),
    [("ends", "connection closed by rank 0"), ("sleeps", "timed out after 1 s waiting for rank 0")],
)
def test_a_message_that_does_not_come_is_named(world: World, deserter: str, cause: str) -> None:
    words, seconds = world.run(2, fail, deserter)[1]
    assert words == f"rank 1: receiving the input of 1F1 from pipeline rank 0 failed: {cause}"
    assert seconds < 30


def overrun(rank: int, ends: bool) -> str:
    """The receiver never takes what there is, so that no slot becomes free."""
    box = mailbox(rank, 1, timeout_s=60 if ends else 1)
    if rank == 1:
        time.sleep(0.5 if ends else 3)
        return ""
    box.send(message(0), content(0))
    try:
        box.send(message(1), content(1))
    except CommunicationError as error:
        return str(error)
    return "sent"


@pytest.mark.parametrize(
    ("ends", "cause"),
    [(True, "connection closed by rank 1"), (False, "timed out after 1 s waiting for rank 1")],
)
def test_a_receiver_that_never_takes_anything_is_named(world: World, ends: bool, cause: str) -> None:
    words = world.run(2, overrun, ends)[0]
    assert words == f"rank 0: sending the output of 0F1 to pipeline rank 1 failed: {cause}"
