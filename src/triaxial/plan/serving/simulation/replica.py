"""`Replica`: one engine under the rules of `triaxial.serve.batching`, moved from event to event instead of token to token.

What decodes is a `Group`, of which only sums are kept; a run of equal decode steps is one event. The rules, their order
and their rounding are the engine's: `tests/plan/serving/test_engine_rules.py` holds every step against it.
"""

from __future__ import annotations

import bisect
import math
from collections import deque

from triaxial.plan.serving.simulation.clock import Clock
from triaxial.plan.serving.simulation.flight import Flight, Stages
from triaxial.plan.serving.simulation.group import Group
from triaxial.plan.serving.simulation.limits import Limits
from triaxial.plan.serving.simulation.served import Life, Step, Totals


class Replica:
    """Call `arrive` and `advance` in the order of time; `next_event` says when `advance` is due."""

    def __init__(self, clock: Clock, limits: Limits, lives: list[Life], trace: list[Step] | None = None) -> None:
        """
        Args:
            lives: all requests by number, in the order of arrival; those of other replicas too.
            trace: where to note every step.
        """
        self.next_event = math.inf
        self.totals = Totals()
        self._clock, self._limits, self._lives, self._trace = clock, limits, lives, trace
        self._waiting: deque[int] = deque()  # by arrival
        self._running: list[int] = []  # by arrival: the youngest last, and all of them older than those that wait
        self._partial: int | None = None  # the running one whose prompt is not in steps to its end
        self._ready = self._no_group()
        self._flights: deque[Flight] = deque()
        self._free = limits.kv_blocks
        self._outstanding = 0
        self._stages = Stages()

    def arrive(self, request: int) -> None:
        """It waits; if a step can be sent for it, `next_event` is now or at the end of the step that is going on."""
        life = self._lives[request]
        self._waiting.append(request)
        self._outstanding += life.prompt + life.output
        if len(self._flights) < self._clock.stages:
            self.next_event = life.arrival
        elif len(self._waiting) == 1 and len(self._running) < self._limits.max_batch and self._partial is None:
            self._end_run(self._flights[0], life.arrival)

    def _end_run(self, run: Flight, now: float) -> None:
        """With the step that is going on: the next may hold someone else too."""
        if run.steps > 1:
            run.steps = run.steps_until(now)
            seconds = run.elapsed(run.steps)
            self._stages = Stages()
            self._stages.send(run, run.start, seconds, seconds)
            self.next_event = run.end

    def outstanding(self, now: float) -> int:
        """Tokens yet to be read or written for the requests that are here."""
        return self._outstanding - sum(len(flight.group) * flight.steps_done(now) for flight in self._flights)

    def advance(self, until: float = math.inf) -> list[int]:
        """What happens at `next_event`: steps come back, and the next are sent.

        Args:
            until: nothing comes in before.

        Returns: the requests that are answered.
        """
        now = self.next_event
        answered: list[int] = []
        while self._flights and self._flights[0].end <= now:
            answered += self._land(self._flights.popleft())
        while len(self._flights) < self._clock.stages and self._send(now):
            pass
        if self._clock.stages > 1 and self._trace is None:
            self._decode_in_turn(until)
        self.next_event = self._flights[0].end if self._flights else math.inf
        return answered

    def _decode_in_turn(self, until: float) -> None:
        """While all steps on their way only decode and nobody waits, each is followed by the same again."""
        if self._waiting or self._partial is not None or len(self._ready):
            return
        share = self._share()
        if any(f.lines is None or f.ending or len(f.group) > share for f in self._flights):
            return
        groups = [flight.group for flight in self._flights]
        most = min((self._alike(flight) for flight in self._flights), default=0)
        while most and sum(group.new_blocks(most) for group in groups) > self._free:
            most //= 2
        for run in self._stages.send_in_turn(self._flights, most, until) if most else ():
            self._count(run)
            self._step(run.group, run.steps)
        order = sorted(self._flights, key=lambda flight: flight.end)
        self._flights = deque(order)

    def _alike(self, flight: Flight) -> int:
        """Steps after this one that differ from it by a token a member only."""
        assert flight.lines is not None
        up_to = min(line.up_to for line in flight.lines)
        return min(flight.group.steps_left, int((up_to - flight.context) / len(flight.group)))

    # A step comes back

    def _land(self, flight: Flight) -> list[int]:
        group, answered = flight.group, []
        self._count(flight)
        if len(group):
            self._step(group, flight.steps - 1)  # the first was counted when it was sent
            for request, blocks in group.pop_ended():
                self._answer(request, blocks, flight.end)
                answered.append(request)
        for request, restarts in flight.ending:
            if self._lives[request].restarts == restarts and self._give_first(request, group, flight.end):
                answered.append(request)
        if len(self._ready):
            self._ready.merge(group)
        else:
            self._ready = group
        return answered

    def _count(self, flight: Flight) -> None:
        steps, size, totals = flight.steps, len(flight.group), self.totals
        self._outstanding -= steps * size
        totals.busy_s += flight.interval
        if size:
            totals.decode_steps += steps
            totals.decoded += steps * size
            totals.decode_context += steps * flight.context + size * (steps * (steps - 1) // 2)
        if flight.prompts:
            totals.prompts += len(flight.ending)
            totals.prompt_tokens += sum(tokens for _, tokens in flight.prompts)
        if self._trace is not None:
            self._trace.append(Step(flight.start, flight.end, steps, flight.decoding, tuple(flight.prompts)))

    def _give_first(self, request: int, group: Group, now: float) -> bool:
        """The prompt is through: a token is given. Returns: it was the last one."""
        life = self._lives[request]
        if life.given == 0:
            life.first_token = now
            self._outstanding -= life.prompt
        life.given += 1
        self._outstanding -= 1
        if life.given == life.output:
            self._answer(request, self._blocks_of_prompt(life), now)
            return True
        group.add(request, life.computed, life.output - life.given, life.dropped)
        return False

    def _answer(self, request: int, blocks: int, now: float) -> None:
        self._lives[request].last_token = now
        self._free += blocks
        del self._running[bisect.bisect_left(self._running, request)]

    # A step is put together

    def _send(self, now: float) -> bool:
        """Returns: there was something to send."""
        group = self._decoding()
        decoding = tuple(group.members) if self._trace is not None else ()
        flight = Flight(group, decoding, group.context_to_read(self._clock.cost.uneven))
        if self._partial is not None or self._waiting:
            self._add_prompts(flight, now)
        if not len(group) and not flight.prompts:
            return False
        self._stages.send(flight, now, *self._price(flight))
        self._flights.append(flight)
        return True

    def _price(self, flight: Flight) -> tuple[float, float]:
        """Seconds of the step, and until the next can follow. Without prompts it becomes a run of steps."""
        size, context = len(flight.group), flight.context
        if flight.prompts:
            tokens = sum(tokens for _, tokens in flight.prompts)
            return self._clock.mixed(tokens, flight.pairs, size, context, len(flight.ending))
        flight.lines = self._clock.decode(size, context)
        if self._clock.stages > 1:
            return flight.lines[0].at(context), flight.lines[1].at(context)
        waits = self._partial is not None or bool(self._waiting)
        if waits and self._limits.window is not None:  # for blocks, which any step may give back
            return flight.elapsed(1), flight.elapsed(1)
        flight.steps = 1 + flight.group.steps_within(self._free, self._alike(flight))
        return flight.elapsed(flight.steps), flight.elapsed(flight.steps)

    def _decoding(self) -> Group:
        """Rules 2, 4 and 5: the step's share of what decodes, one step on."""
        share = self._share()
        if len(self._ready) > share:
            group = self._ready.split(share)
        else:
            group, self._ready = self._ready, self._no_group()
        while group.lacks(self._free):
            self._preempt_youngest(group)
        self._step(group, 1)
        return group

    def _no_group(self) -> Group:
        return Group(self._limits.block_tokens, self._limits.window)

    def _step(self, group: Group, steps: int) -> None:
        self._free += group.dropped_blocks(steps) - group.new_blocks(steps)
        group.step(steps)

    def _share(self) -> int:
        """Of the sequences that decode, on their way or not, those that one step takes."""
        decoding = len(self._running) - (self._partial is not None)
        return min(-(-decoding // self._clock.stages), self._limits.chunk_tokens)

    def _blocks_of_prompt(self, life: Life) -> int:
        return self._limits.blocks_for(life.computed) - life.dropped

    def _preempt_youngest(self, decoding: Group) -> None:
        victim = self._running.pop()
        life = self._lives[victim]
        blocks = self._blocks_of_prompt(life)
        if victim == self._partial:
            self._partial = None
        for group in (decoding, self._ready, *(flight.group for flight in self._flights)):
            if victim in group:
                blocks, left = group.remove(victim)
                on_its_way = group is not decoding and group is not self._ready
                life.given = life.output - left - on_its_way
        self._free += blocks
        life.computed, life.dropped, life.restarts = 0, 0, life.restarts + 1
        self._waiting.appendleft(victim)
        self.totals.preemptions += 1

    def _add_prompts(self, flight: Flight, now: float) -> None:
        """Rule 3: prompts by arrival, as much of them as the step and the free blocks have room for."""
        limits = self._limits
        room = limits.chunk_tokens - len(flight.group)
        while room > 0 and (self._partial is not None or self._begin(now)):
            request = self._partial
            assert request is not None
            life = self._lives[request]
            computed, held = life.computed, limits.blocks_for(life.computed)
            self._free += limits.blocks_behind(computed) - life.dropped
            life.dropped = limits.blocks_behind(computed)
            tokens = min(room, life.prefill - computed, (held + self._free) * limits.block_tokens - computed)
            if tokens == 0:
                return
            life.computed = computed + tokens
            self._free -= limits.blocks_for(life.computed) - held
            room -= tokens
            flight.prompts.append((request, tokens))
            flight.pairs += tokens * computed + tokens * (tokens + 1) // 2
            left = life.prefill - life.computed
            if left == 0:
                self._partial = None
                flight.ending.append((request, life.restarts))
            elif left == 1 and life.given > 0:  # what is left is the last token it gave: it decodes
                self._partial = None
                self._ready.add(request, life.computed, life.output - life.given, life.dropped)
                return
            else:
                return

    def _begin(self, now: float) -> bool:
        """The next that waits runs, if there is room for all of its tokens. Returns: it does."""
        if not self._waiting or len(self._running) == self._limits.max_batch:
            return False
        life = self._lives[self._waiting[0]]
        if self._limits.blocks_for(life.prefill) > self._free:
            return False
        self._partial = self._waiting.popleft()
        self._running.append(self._partial)
        if math.isnan(life.begun):
            life.begun = now
        return True
