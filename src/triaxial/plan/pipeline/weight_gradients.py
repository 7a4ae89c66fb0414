"""Where the weight gradients of a zero-bubble schedule go, given how long everything takes."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence

from triaxial.plan.pipeline.action import Action
from triaxial.plan.pipeline.generators import Rank
from triaxial.plan.pipeline.simulate import Durations


def place_weight_gradients(
    table: Sequence[Rank], placement: Sequence[int], durations: Durations, memory_limit: int
) -> tuple[Rank, ...]:
    """Keep the order of F and I on each rank, and put W into the gaps that open between them.

    The published orders are made for at least as many micro-batches as fill the pipeline; with fewer, they run weight
    gradients that others wait behind. Here a rank runs a W only while its next F or I cannot start before that W would
    end, as far as known from what has already begun elsewhere, or while it holds `memory_limit` activations.

    Args:
        table: the actions of each rank, in an order that can run within the memory limit.
        placement: the rank of each virtual stage.
        durations: of F, I and W on every stage.
        memory_limit: activations that a rank may hold.
    """
    return _Rehearsal(table, placement, durations, memory_limit).run()


class _Rehearsal:
    """Ranks that decide one after another, in the order of time, what to do next."""

    def __init__(
        self, table: Sequence[Rank], placement: Sequence[int], durations: Durations, memory_limit: int
    ) -> None:
        self.placement = placement
        self.seconds = {"F": durations.forward, "I": durations.input, "W": durations.weight}
        self.memory_limit = memory_limit
        self.todo = [deque(action for action in actions if action.kind != "W") for actions in table]
        self.delayed: list[deque[Action]] = [deque() for _ in table]  # each W whose I has run
        self.done: list[list[Action]] = [[] for _ in table]
        self.held = [0] * len(table)
        self.free_s = [0.0] * len(table)
        self.input_s: dict[Action, float] = {}  # when the input of an F or I arrives; unknown until its maker starts

    def run(self) -> tuple[Rank, ...]:
        decisions = [(0.0, rank) for rank in range(len(self.todo))]
        while decisions:
            now, rank = heapq.heappop(decisions)
            if now < self.free_s[rank]:
                continue  # an input arrived while the rank was busy
            choice = self.choose(rank, now)
            if choice is None:
                continue  # the next input to arrive wakes the rank
            action, begin = choice
            end = begin + self.seconds[action.kind]
            self.free_s[rank] = end
            self.done[rank].append(action)
            heapq.heappush(decisions, (end, rank))
            if enabled := self.finish(rank, action):
                self.input_s[enabled] = end
                heapq.heappush(decisions, (end, self.placement[enabled.stage]))
        return tuple(map(tuple, self.done))

    def choose(self, rank: int, now: float) -> tuple[Action, float] | None:
        """The rank's next action and when it begins."""
        ready = self.next_ready(rank)
        if self.delayed[rank] and now + self.seconds["W"] <= ready:
            return self.delayed[rank].popleft(), now
        if ready < math.inf:
            return self.todo[rank].popleft(), max(now, ready)
        return None

    def next_ready(self, rank: int) -> float:
        """When the rank's next F or I can start; infinite if that is unknown or there is none."""
        if not self.todo[rank]:
            return math.inf
        action = self.todo[rank][0]
        if action.kind == "F" and self.held[rank] >= self.memory_limit:
            return math.inf
        if action.kind == "F" and action.stage == 0:
            return 0.0
        return self.input_s.get(action, math.inf)

    def finish(self, rank: int, action: Action) -> Action | None:
        """Keep the books; return the F or I that has its input now."""
        kind, stage, micro_batch = action
        if kind == "W":
            self.held[rank] -= 1
            return None
        if kind == "F":
            self.held[rank] += 1
            is_last = stage == len(self.placement) - 1
            return Action("I", stage, micro_batch) if is_last else Action("F", stage + 1, micro_batch)
        self.delayed[rank].append(Action("W", stage, micro_batch))
        return Action("I", stage - 1, micro_batch) if stage else None
