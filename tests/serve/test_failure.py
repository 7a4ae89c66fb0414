"""A rank that dies, fails or hangs: the replica says which and why within seconds, and leaves no process behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.serve.driver import Driver, collect
from triaxial import BadInput
from triaxial.serve.engine import Engine
from triaxial.serve.request import EngineFailed
from triaxial.serve.settings import EngineSettings

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 256, "max_position_embeddings": 100_000,
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "config.json"


@pytest.fixture
def driver(request: pytest.FixtureRequest, model: Path) -> Iterator[Driver]:
    driver = Driver(model=str(model), layout=getattr(request, "param", "tp=2"))
    yield driver
    driver.close()


def gone(pids: list[int], within_s: float = 5) -> bool:
    """Whether all processes have ended."""
    end = time.monotonic() + within_s
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("driver", ["tp=2", "pp=2"], indirect=True)
@pytest.mark.parametrize(
    ("sent", "says"), [(signal.SIGKILL, "rank 1: ended by SIGKILL"), (signal.SIGSTOP, "rank 1: stopped")]
)
def test_a_lost_rank_fails_what_runs_and_what_comes(driver: Driver, sent: signal.Signals, says: str) -> None:
    pids = driver.engine.pids

    async def lose() -> tuple[float, list[object]]:
        running = [asyncio.create_task(collect(driver.engine, [1, 2, i], max_tokens=50_000)) for i in range(3)]
        while driver.engine.stats().running < 3:
            await asyncio.sleep(0.01)
        os.kill(pids[1], sent)
        begin = time.monotonic()
        failures = await asyncio.gather(*running, return_exceptions=True)
        return time.monotonic() - begin, [*failures, await driver.engine.wait_failed()]

    seconds, failures = driver.run(lose())
    assert seconds < 10
    assert all(says in str(failure) for failure in failures)
    assert gone(pids)
    with pytest.raises(EngineFailed, match=says.split(":")[0]):
        driver.answer([1])


def test_a_rank_that_stops_while_nothing_runs_is_noticed(driver: Driver) -> None:
    os.kill(driver.engine.pids[0], signal.SIGSTOP)
    assert "rank 0: stopped" in driver.run(asyncio.wait_for(driver.engine.wait_failed(), 20))


def test_a_model_whose_weights_do_not_fit_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")

    async def start() -> None:
        engine = Engine(EngineSettings(model=str(tmp_path), layout="tp=2"))
        try:
            await engine.start()
        finally:
            assert gone(engine.pids)

    with pytest.raises(BadInput, match=r"cannot read model\.embed_tokens\.weight"):
        asyncio.run(start())


@pytest.mark.parametrize(
    ("layout", "says"), [("dp=2", "tp and pp only"), ("tp=3", "valid: 1, 2, 4"), ("pp=7", "more than the 6 blocks")]
)
def test_a_layout_that_cannot_be_run_is_refused_before_anything_starts(model: Path, layout: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        Engine(EngineSettings(model=str(model), layout=layout))


def test_stopping_leaves_no_process_and_ends_what_runs(driver: Driver) -> None:
    pids = driver.engine.pids

    async def stop() -> BaseException | None:
        running = asyncio.create_task(collect(driver.engine, [1], max_tokens=50_000))
        while driver.engine.stats().running < 1:
            await asyncio.sleep(0.01)
        await driver.engine.stop()
        return (await asyncio.gather(running, return_exceptions=True))[0]  # type: ignore[return-value]

    assert "was stopped" in str(driver.run(stop()))
    assert gone(pids)


def test_ranks_end_with_a_front_that_is_killed(model: Path) -> None:
    program = (
        "import asyncio, sys\n"
        "from triaxial.serve.engine import Engine\n"
        "from triaxial.serve.settings import EngineSettings\n"
        "async def main():\n"
        f"    engine = Engine(EngineSettings(model={str(model)!r}, layout='tp=2'))\n"
        "    await engine.start()\n"
        "    print(*engine.pids, flush=True)\n"
        "    await asyncio.sleep(100)\n"
        "asyncio.run(main())\n"
    )
    front = psutil.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    pids = [int(pid) for pid in front.stdout.readline().split()]
    assert len(pids) == 2
    front.kill()
    front.wait()
    assert gone(pids)
