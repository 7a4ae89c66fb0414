"""How long the planner for serving takes: simulations of 10,000 requests, and searches on 64 GPUs.

    python bench/serving_planner.py

Prints seconds of this process's CPU time: other work on the machine does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.table import Table

from triaxial.cluster.spec import load_cluster
from triaxial.model.spec import load_model_spec
from triaxial.plan.layout import Layout
from triaxial.plan.serving.cost.step import step_cost
from triaxial.plan.serving.demand import demand_for, serving_work
from triaxial.plan.serving.search.plan import plan_serving
from triaxial.plan.serving.simulation.limits import Limits
from triaxial.plan.serving.simulation.simulate import simulate
from triaxial.plan.serving.traffic import LogNormal, draw_lengths, poisson

REQUESTS = 10_000
MODEL = load_model_spec("llama-3.1-70b")


def simulations() -> Iterator[tuple[str, str, float]]:
    cluster = load_cluster("8x8xH100-SXM")
    lengths = draw_lengths(LogNormal(1024, 0.5), LogNormal(256, 0.5), REQUESTS)
    work = serving_work(demand_for(input_len="1024", output_len="256"), "bf16", "bf16")
    for tp, pp, replicas, rate in [(8, 1, 1, 1.0), (8, 1, 1, 8.0), (8, 1, 8, 64.0), (4, 2, 1, 8.0), (4, 4, 1, 2.0)]:
        cost = step_cost(MODEL, cluster, Layout(tp=tp, pp=pp), work)
        limits = Limits(max_batch=256, chunk_tokens=1024, kv_tokens=cost.memory.max_kv_tokens)
        traffic = poisson(*lengths, rate)
        seconds = _seconds(lambda: simulate(traffic, cost, limits, replicas=replicas))  # noqa: B023
        yield f"simulate {REQUESTS:,}", f"tp={tp},pp={pp},dp={replicas}, {rate:g} requests/s", seconds


def searches() -> Iterator[tuple[str, str, float]]:
    cluster = load_cluster("8x8xH100-SXM")
    for objective, asked in [
        ("throughput", {"ttft_s": 0.5, "tpot_s": 0.05}),
        ("gpus", {"rate": 40.0, "ttft_s": 0.5, "tpot_s": 0.05}),
        ("latency", {"rate": 10.0}),
        ("throughput", {}),
    ]:
        demand = demand_for(input_len="1024", output_len="256", **asked)  # type: ignore[arg-type]
        work = serving_work(demand, "bf16", "bf16")
        for flips in (False, True):
            seconds = _seconds(lambda: plan_serving(MODEL, cluster, work, demand, objective, flips=flips))  # type: ignore[arg-type]  # noqa: B023
            yield f"plan{' with flips' if flips else ''}", f"64 GPUs, {objective}, {asked}", seconds


def _seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    table = Table("what", "of", "CPU s")
    for what, of, seconds in [*simulations(), *searches()]:
        table.add_row(what, of, f"{seconds:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
