"""What a step holds: the rules of `serve/batching.py`, one by one."""

from __future__ import annotations

import random

import pytest

from triaxial.serve.batching import Limits, Running, Scheduler
from triaxial.serve.blocks import BlockPool
from triaxial.serve.request import Request, Sampling
from triaxial.serve.wire import Step

BLOCK = 4


def scheduler(
    blocks: int = 100, stages: int = 1, max_batch: int = 8, step_tokens: int = 16, window: int | None = None
) -> Scheduler:
    return Scheduler(BlockPool(blocks, BLOCK, max_batch), Limits(stages, max_batch, step_tokens, window))


def add(s: Scheduler, *lengths: int) -> list[Running]:
    return [s.add(Request(str(length), tuple(range(length)), Sampling()), seed=0) for length in lengths]


def counts(step: Step | None) -> list[int]:
    return [] if step is None else [len(entry.tokens) for entry in step.entries]


def finish(s: Scheduler, step: Step, token: int = 7) -> None:
    """The ranks answer: every sequence that samples gets a token."""
    for part in s.complete(step.number):
        if part.samples and not part.void:
            part.sequence.tokens.append(token)


def run(s: Scheduler) -> Step:
    step = s.next_step()
    assert step is not None
    finish(s, step)
    return step


def test_a_prompt_longer_than_a_step_comes_in_chunks_and_only_the_last_samples() -> None:
    s = scheduler()
    add(s, 37)
    steps = [run(s) for _ in range(3)]
    assert [counts(step) for step in steps] == [[16], [16], [5]]
    assert [step.entries[0].first for step in steps] == [0, 16, 32]
    assert [step.entries[0].sample for step in steps] == [False, False, True]
    assert [len(step.entries[0].blocks) for step in steps] == [4, 8, 10]


def test_decoding_comes_first_and_prompts_share_what_is_left() -> None:
    s = scheduler()
    add(s, 3)
    run(s)
    add(s, 20, 4)
    assert counts(run(s)) == [1, 15]
    assert counts(run(s)) == [1, 5, 4]  # the next prompt begins in the step that ends the one before it
    assert counts(run(s)) == [1, 1, 1]


def test_no_more_sequences_run_than_the_batch_allows() -> None:
    s = scheduler(max_batch=2)
    first, *_ = add(s, 2, 2, 2)
    assert counts(run(s)) == [2, 2]
    assert (s.running, s.waiting) == (2, 1)
    s.remove(first)
    assert counts(run(s)) == [1, 2]


def test_a_prompt_waits_for_blocks_and_those_behind_it_do_not_overtake() -> None:
    s = scheduler(blocks=5)
    first, _, _ = add(s, 10, 12, 1)
    assert counts(run(s)) == [10]  # 3 blocks of 5; the next needs 3
    assert counts(run(s)) == [1]
    s.remove(first)
    assert counts(run(s)) == [12, 1]


def test_the_youngest_is_preempted_and_computes_all_its_tokens_again() -> None:
    s = scheduler(blocks=4)
    old, young = add(s, 7, 7)
    run(s)  # 2 blocks each, both full after the next token
    run(s)
    assert s.pool.free == 0
    step = s.next_step()
    assert step is not None
    assert [entry.tokens for entry in step.entries] == [[7]]
    assert (s.preemptions, young.slot, young.blocks) == (1, None, [])
    finish(s, step)
    s.remove(old)
    again = run(s)
    assert [entry.tokens for entry in again.entries] == [[*range(7), 7, 7]]
    assert again.states[0].prompt == 7


def test_an_answer_to_an_earlier_life_is_void() -> None:
    s = scheduler(blocks=4, stages=2)
    old, young = add(s, 7, 7)
    run(s)
    one, two = s.next_step(), s.next_step()
    assert one is not None
    assert two is not None
    finish(s, one)
    three = s.next_step()  # the older one needs a block, and takes it from the one that is in flight
    assert three is not None
    assert [len(entry.blocks) for entry in three.entries] == [3]
    assert [(part.sequence, part.void) for part in s.complete(two.number)] == [(young, True)]
    assert (young.tokens, young.computed, young.blocks) == ([*range(7), 7], 0, [])
    assert old.slot is not None


def test_as_many_steps_are_in_flight_as_there_are_stages_and_share_the_sequences() -> None:
    s = scheduler(stages=2)
    add(s, 2, 2, 2, 2, 2)
    run(s)
    one, two = s.next_step(), s.next_step()
    assert (counts(one), counts(two)) == ([1, 1, 1], [1, 1])
    assert s.next_step() is None
    assert one is not None
    assert two is not None
    assert not {e.slot for e in one.entries} & {e.slot for e in two.entries}


def test_chunks_of_one_prompt_follow_each_other_through_the_stages() -> None:
    s = scheduler(stages=2)
    add(s, 30)
    one, two = s.next_step(), s.next_step()
    assert (counts(one), counts(two)) == ([16], [14])


def test_blocks_that_no_window_reaches_are_given_back() -> None:
    s = scheduler(window=6)
    (sequence,) = add(s, 16)
    run(s)
    assert s.pool.used == 4
    step = run(s)  # position 16 sees 11 to 16: blocks 0 and 1 are out of sight
    assert sequence.dropped == 2
    assert step.entries[0].base == 8
    assert s.pool.used == 3


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_nothing_is_lost_under_random_traffic(stages: int) -> None:
    """Blocks are never shared, every sequence gets its tokens in order, and all blocks come back."""
    rng = random.Random(stages)
    s = scheduler(blocks=30, stages=stages, max_batch=5)
    open_steps: list[Step] = []
    wanted: dict[Running, int] = {}
    for _ in range(3000):
        if rng.random() < 0.2 and len(wanted) < 12:
            wanted[add(s, rng.randrange(1, 60))[0]] = rng.randrange(1, 30)
        if wanted and rng.random() < 0.02:
            gone = rng.choice(list(wanted))
            del wanted[gone]
            s.remove(gone)
        while (step := s.next_step()) is not None:
            open_steps.append(step)
        held = [block for sequence in wanted for block in sequence.blocks]
        assert len(held) == len(set(held)) == s.pool.used
        if open_steps:
            step = open_steps.pop(0)
            for part in s.complete(step.number):
                if part.samples and not part.void and part.sequence in wanted:
                    part.sequence.tokens.append(len(part.sequence.tokens))
                    if part.sequence.given == wanted[part.sequence]:
                        assert part.sequence.tokens == list(range(len(part.sequence.tokens)))
                        del wanted[part.sequence]
                        s.remove(part.sequence)
    assert s.preemptions > 0
    for sequence in list(wanted):
        s.remove(sequence)
    assert (s.pool.used, s.running, s.waiting) == (0, 0, 0)
