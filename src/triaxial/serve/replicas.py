"""Independent replicas behind one front: which one takes a request, and what happens to it when that one dies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Self, TypeVar

from triaxial.serve.metrics import Metrics
from triaxial.serve.replica import Engine, Replica
from triaxial.serve.request import Chunk, EngineFailed, Request
from triaxial.serve.routing import Conversations

ATTEMPTS = 3
"""That a request gets. One that kills every engine it meets must not go on for ever."""
PATIENCE_S = 120
"""That a request waits for a replica that is being restarted."""

Item = TypeVar("Item")


class Replicas:
    """Use as a context manager: the engines run inside it."""

    def __init__(self, make: Callable[[int], Engine], count: int, metrics: Metrics) -> None:
        self._changed = asyncio.Event()
        self.all = [Replica(index, lambda i=index: make(i), metrics, self._wake) for index in range(count)]  # type: ignore[misc]
        self._conversations = Conversations()
        metrics.watch(self.all)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        """Start all engines.

        Raises:
            BadInput: the model or the layout cannot be run here.
            EngineFailed: an engine does not start.
        """
        starts = [asyncio.create_task(replica.start()) for replica in self.all]
        try:
            await asyncio.gather(*starts)
        except BaseException:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            await self._stop_all()
            raise
        self._keepers = [asyncio.create_task(replica.keep_running()) for replica in self.all]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end()

    async def end(self) -> None:
        """Stop all engines; requests that are still running fail, and new ones too."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await self._stop_all()

    async def _stop_all(self) -> None:
        await asyncio.gather(*(replica.stop() for replica in self.all))

    @property
    def ready(self) -> bool:
        """All of them; one that is missing shows at once, though the others serve on."""
        return all(replica.ready for replica in self.all)

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """Send a request to the best replica.

        Raises:
            EngineFailed: that replica died, or none will be ready.
        """
        arrived = time.monotonic()
        replica = await self._pick(request)
        async with aclosing(replica.generate(request, arrived)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _pick(self, request: Request) -> Replica:
        """The ready replica with the fewest tokens outstanding; of equals, the one that knows the conversation."""
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        while not (ready := [replica for replica in self.all if replica.ready]):
            if all(replica.state in ("given up", "stopped") for replica in self.all):
                raise EngineFailed(str(self.all[0].cause))
            try:
                async with asyncio.timeout_at(deadline):
                    await self._changed.wait()
            except TimeoutError:
                raise EngineFailed(f"no replica is ready: {self.all[0].cause}") from None
        least = min(replica.outstanding for replica in ready)
        idlest = [replica for replica in ready if replica.outstanding == least]
        index = self._conversations.place(request.prompt, [replica.index for replica in idlest])
        return self.all[index]


async def retried(begin: Callable[[], AsyncGenerator[Item, None]], whole: bool) -> AsyncGenerator[Item, None]:
    """What `begin()` yields; if its engine fails before anything has left here, it is begun again.

    Args:
        whole: keep everything back until the end, so that any failure can be retried.

    Raises:
        EngineFailed: something had left, or every attempt failed.
    """
    for attempt in range(1, ATTEMPTS + 1):
        left, kept = False, list[Item]()
        try:
            async with aclosing(begin()) as items:
                async for item in items:
                    if whole:
                        kept.append(item)
                    else:
                        left = True
                        yield item
            break
        except EngineFailed:
            if left or attempt == ATTEMPTS:
                raise
    for item in kept:
        yield item
