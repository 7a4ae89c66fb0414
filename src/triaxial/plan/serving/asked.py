"""What a user asked for as a `Demand`: lengths and arrivals given in numbers, or recorded in files."""

from __future__ import annotations

from pathlib import Path

from triaxial import BadInput
from triaxial.cluster.spec import Cluster
from triaxial.plan.serving.demand import Demand
from triaxial.plan.serving.traces import read_lengths, read_trace
from triaxial.plan.serving.traffic import draw_lengths, parse_lengths, poisson
from triaxial.plan.serving.workload import Serving


def demand_for(
    *,
    input_len: str | None = None,
    output_len: str | None = None,
    lengths: Path | None = None,
    trace: Path | None = None,
    rate: float | None = None,
    requests: int = 1000,
    ttft_s: float | None = None,
    tpot_s: float | None = None,
) -> Demand:
    """Make the demand of one of: a trace, a file of lengths, or lengths of prompts and of answers.

    Args:
        rate: requests per second; None is that of the trace, or without one as many as can be served.
        requests: how many to simulate; of a trace the first.

    Raises:
        BadInput: none or several of the three, a rate or target that is not positive, or a file that cannot be read.
    """
    for name, value in (("rate", rate), ("ttft", ttft_s), ("tpot", tpot_s)):
        if value is not None and not 0 < value < float("inf"):
            raise BadInput(f"--{name} must be more than zero, not {value}")
    given = [trace is not None, lengths is not None, input_len is not None or output_len is not None]
    if sum(given) != 1:
        raise BadInput("say how long requests are, in one way: --input and --output, --lengths FILE, or --trace FILE")
    if trace is not None:
        traffic = read_trace(trace).first(requests)
        if traffic.rate is None:
            raise BadInput(f"{trace}: all requests arrive at once, which is no rate: give --lengths and --rate instead")
        return Demand(traffic.at_rate(rate) if rate else traffic, rate or traffic.rate, ttft_s, tpot_s, recorded=True)
    if lengths is not None:
        inputs, outputs = read_lengths(lengths, requests)
    elif input_len is None or output_len is None:
        raise BadInput(f"--{'input' if input_len is None else 'output'} is missing: give both lengths")
    else:
        both = parse_lengths("input", input_len), parse_lengths("output", output_len)
        inputs, outputs = draw_lengths(*both, requests)
    return Demand(poisson(inputs, outputs, rate or 1.0), rate, ttft_s, tpot_s)


def serving_work(demand: Demand, precision: str, kv_precision: str) -> Serving:
    """The same in means, as the cost of a step and the memory are asked for.

    Raises:
        BadInput: an unknown precision.
    """
    return Serving(
        input_len=max(1, round(demand.mean_input)),
        output_len=max(1, round(demand.mean_output)),
        precision=precision,  # type: ignore[arg-type]  # checked there
        kv_precision=kv_precision,  # type: ignore[arg-type]
        rate=demand.rate,
        ttft_s=demand.ttft_s,
        tpot_s=demand.tpot_s,
    )


def with_price(cluster: Cluster, price_per_gpu_hour: float | None) -> Cluster:
    """Raises BadInput for a price that is not positive."""
    if price_per_gpu_hour is None:
        return cluster
    if not 0 < price_per_gpu_hour < float("inf"):
        raise BadInput(f"--price must be more than zero, not {price_per_gpu_hour}")
    return cluster.model_copy(update={"gpu_price_per_hour": price_per_gpu_hour})
