"""Replicas behind one front: who takes a request, and what becomes of it when an engine dies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

import pytest

from tests.serve.fake_engine import FakeEngine
from triaxial.serve import replica as replica_module
from triaxial.serve.metrics import Metrics
from triaxial.serve.replicas import ATTEMPTS, Replicas, retried
from triaxial.serve.request import Chunk, EngineFailed, Request, Sampling
from triaxial.serve.routing import Conversations


class House:
    """Replicas of fake engines; `engines[i]` are those of replica i, the newest last."""

    def __init__(self, count: int, make: Callable[[], FakeEngine]) -> None:
        self.engines: list[list[FakeEngine]] = [[] for _ in range(count)]
        self._make = make
        self.metrics = Metrics("m")
        self.replicas = Replicas(self._new, count, self.metrics)

    def _new(self, index: int) -> FakeEngine:
        self.engines[index].append(self._make())
        return self.engines[index][-1]

    @property
    def served(self) -> list[int]:
        """Requests that each replica's engines have seen."""
        return [sum(len(engine.requests) for engine in engines) for engines in self.engines]

    def metric(self, line_begins: str) -> float:
        text = self.metrics.render().decode()
        return float(next(line for line in text.splitlines() if line.startswith(line_begins)).rpartition(" ")[2])


@pytest.fixture(autouse=True)
def _quick_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_module, "FIRST_BACKOFF_S", 0.001)


@asynccontextmanager
async def house(count: int, make: Callable[[], FakeEngine] = FakeEngine) -> AsyncIterator[House]:
    it = House(count, make)
    async with it.replicas:
        yield it


def request(max_tokens: int = 3, prompt: tuple[int, ...] = (40,), name: str = "r") -> Request:
    return Request(name, prompt, Sampling(max_tokens=max_tokens))


async def tokens(chunks: AsyncGenerator[Chunk, None]) -> list[int]:
    async with aclosing(chunks):
        return [token async for chunk in chunks for token in chunk.tokens]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def test_requests_go_to_the_replica_with_the_fewest_tokens_outstanding() -> None:
    async def scenario() -> tuple[list[int], list[int]]:
        async with house(2, lambda: FakeEngine(delay_s=0.01)) as h:
            long = asyncio.create_task(tokens(h.replicas.generate(request(50))))
            await asyncio.sleep(0.005)
            await asyncio.gather(*(tokens(h.replicas.generate(request(2, (i,)))) for i in range(3)))
            outstanding = [replica.outstanding for replica in h.replicas.all]
            long.cancel()
            await asyncio.gather(long, return_exceptions=True)
            assert [replica.outstanding for replica in h.replicas.all] == [0, 0]
            return h.served, outstanding

    served, outstanding = asyncio.run(scenario())
    assert sorted(served) == [1, 3]
    assert min(outstanding) == 0 < max(outstanding) < 51


def test_a_conversation_stays_on_its_replica_while_all_are_idle() -> None:
    async def scenario() -> list[list[int]]:
        async with house(3) as h:
            history = tuple(range(40, 60))
            places = []
            for _ in range(4):
                history += tuple(await tokens(h.replicas.generate(request(9, history))))
                places.append(list(h.served))
                await tokens(h.replicas.generate(request(1)))  # others come between
            return places

    first, *_, last = asyncio.run(scenario())
    assert max(last) - max(first) >= 3


def test_a_known_prefix_wins_only_among_equals() -> None:
    places = Conversations()
    prompt = tuple(range(100))
    home = places.place(prompt, [0, 1, 2])
    assert [places.place((*prompt, turn), [0, 1, 2]) for turn in range(4)] == [home] * 4
    assert places.place((*prompt, 7), [i for i in range(3) if i != home]) != home
    assert places.place((1, 2, 3), [2]) == 2


def test_short_prompts_take_turns() -> None:
    places = Conversations()
    assert sorted(places.place((1,), [0, 1, 2]) for _ in range(6)) == [0, 0, 1, 1, 2, 2]


def test_a_request_that_has_sent_nothing_is_begun_again_elsewhere() -> None:
    async def scenario() -> tuple[list[int], list[int], bool]:
        async with house(2, lambda: FakeEngine(prompt_delay_s=0.05)) as h:
            answer = asyncio.create_task(tokens(retried(lambda: h.replicas.generate(request()), whole=False)))
            await until(lambda: sum(h.served) == 1)
            h.engines[h.served.index(1)][0].fail()
            return await answer, h.served, h.replicas.ready

    answer, served, _ = asyncio.run(scenario())
    assert answer == [41, 42, 43]
    assert served == [1, 1]


def test_a_lone_replica_is_restarted_and_takes_the_request_again() -> None:
    async def scenario() -> tuple[list[int], int, str | None, float]:
        async with house(1, lambda: FakeEngine(prompt_delay_s=0.05)) as h:
            answer = asyncio.create_task(tokens(retried(lambda: h.replicas.generate(request()), whole=False)))
            await until(lambda: h.served == [1])
            h.engines[0][0].fail("rank 1: ended by SIGKILL")
            await until(lambda: not h.replicas.ready)
            restarts = 'triaxial:replica_restarts_total{engine="0"'
            assert h.metric('triaxial:replica_ready{engine="0"') == 0
            result = await answer
            assert h.engines[0][0].stopped
            return result, len(h.engines[0]), h.replicas.all[0].cause, h.metric(restarts)

    assert asyncio.run(scenario()) == ([41, 42, 43], 2, "rank 1: ended by SIGKILL", 1)


def test_a_request_that_has_sent_tokens_fails_with_the_engines_own_error() -> None:
    async def scenario() -> list[int]:
        async with house(2, lambda: FakeEngine(delay_s=0.005)) as h:
            got = list[int]()

            async def read() -> None:
                async for chunk in retried(lambda: h.replicas.generate(request(1000)), whole=False):
                    got.extend(chunk.tokens)
                    if len(got) == 3:
                        h.engines[h.served.index(1)][0].fail("rank 0: out of memory")

            with pytest.raises(EngineFailed, match="rank 0: out of memory"):
                await read()
            assert sum(h.served) == 1
            return got

    assert asyncio.run(scenario()) == [41, 42, 43]


def test_an_answer_kept_back_to_its_end_survives_a_death_in_its_middle() -> None:
    async def scenario() -> tuple[list[int], list[int]]:
        async with house(2, lambda: FakeEngine(delay_s=0.005)) as h:
            answer = asyncio.create_task(tokens(retried(lambda: h.replicas.generate(request(20)), whole=True)))
            await until(lambda: any(r.outstanding in range(1, 10) for r in h.replicas.all))
            h.engines[h.served.index(1)][0].fail()
            return await answer, h.served

    assert asyncio.run(scenario()) == (list(range(41, 61)), [1, 1])


def test_a_request_that_kills_every_engine_is_given_up() -> None:
    class Poisoned(FakeEngine):
        async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
            self.requests.append(request)
            self.fail("rank 0: poisoned")
            raise EngineFailed("rank 0: poisoned")
            yield

    async def scenario() -> int:
        async with house(1, Poisoned) as h:
            with pytest.raises(EngineFailed, match="poisoned"):
                await tokens(retried(lambda: h.replicas.generate(request()), whole=True))
            return sum(h.served)

    assert asyncio.run(scenario()) == ATTEMPTS


def test_a_replica_that_keeps_failing_is_given_up_and_its_cause_is_told() -> None:
    starts = 0

    def make() -> FakeEngine:
        nonlocal starts
        starts += 1
        return FakeEngine(fails_to_start="rank 1: no space left" if starts > 1 else None)

    async def scenario() -> str:
        async with house(1, make) as h:
            h.engines[0][0].fail("rank 0: ended by SIGSEGV")
            await until(lambda: h.replicas.all[0].state == "given up")
            with pytest.raises(EngineFailed) as failure:
                await tokens(h.replicas.generate(request()))
            return str(failure.value)

    assert asyncio.run(scenario()) == "rank 1: no space left"
    assert starts == replica_module.FAILURES_IN_A_ROW


def test_other_replicas_do_not_notice() -> None:
    async def scenario() -> tuple[list[int], list[int]]:
        async with house(2, lambda: FakeEngine(delay_s=0.002)) as h:
            answer = asyncio.create_task(tokens(h.replicas.generate(request(60))))
            await until(lambda: sum(h.served) == 1)
            busy = h.served.index(1)
            h.engines[1 - busy][0].fail()
            result = await answer
            await until(lambda: h.replicas.ready)
            return result, [len(h.engines[busy]), len(h.engines[1 - busy])]

    result, engines = asyncio.run(scenario())
    assert len(result) == 60
    assert engines == [1, 2]


def test_an_engine_that_does_not_start_stops_all_and_its_error_is_raised() -> None:
    engines: list[FakeEngine] = []

    def make() -> FakeEngine:
        engines.append(FakeEngine(fails_to_start="rank 0: no such weights" if engines else None))
        return engines[-1]

    async def scenario() -> None:
        async with house(2, make):
            raise AssertionError("it must not start")

    with pytest.raises(EngineFailed, match="no such weights"):
        asyncio.run(scenario())
    assert [engine.stopped for engine in engines] == [True, True]


def test_every_request_is_counted_with_its_reason() -> None:
    async def scenario() -> House:
        async with house(1, lambda: FakeEngine(delay_s=0.001)) as h:
            await tokens(h.replicas.generate(request(5)))
            async with aclosing(h.replicas.generate(request(1000))) as chunks:  # its reader has enough
                await anext(chunks)
            gone = asyncio.create_task(tokens(h.replicas.generate(request(1000))))
            await until(lambda: h.replicas.all[0].outstanding in range(1, 990))
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
            dying = asyncio.create_task(tokens(h.replicas.generate(request(1000))))
            await until(lambda: h.replicas.all[0].outstanding in range(1, 990))
            h.engines[0][0].fail()
            await asyncio.gather(dying, return_exceptions=True)
            return h

    h = asyncio.run(scenario())
    reasons = ("length", "stop", "abort", "error")
    counted = [h.metric(f'vllm:request_success_total{{engine="0",finished_reason="{reason}"') for reason in reasons]
    assert counted == [1, 1, 1, 1]
    assert h.metric("vllm:prompt_tokens_total") == 4
    assert h.metric("vllm:time_to_first_token_seconds_count") == 4
    assert h.metric("vllm:e2e_request_latency_seconds_count") == 2  # those that ended well
    assert h.metric("vllm:inter_token_latency_seconds_count") >= 4
