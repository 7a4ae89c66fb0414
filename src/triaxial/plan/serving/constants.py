"""The few numbers of the serving model that no datasheet gives. Each says what it is and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType

from triaxial.cluster.hardware import Device

GDDR_BYTES_PER_S = 11e9
"""A multiprocessor's part of the bandwidth that no HBM device is below, and no GDDR device above."""


def kind_of(device: Device) -> str:
    """The generation of a device with HBM; `gddr` of any other."""
    per_multiprocessor = device.memory_bandwidth_bytes_per_s / device.sm_count
    return "gddr" if per_multiprocessor < GDDR_BYTES_PER_S else device.generation


@dataclass(frozen=True, kw_only=True)
class HostTimes:
    """What the host of an engine takes, while its devices wait."""

    step_s: float
    """Once a step: scheduling, inputs, the answer."""
    sequence_s: float
    """The same for every sequence of a step."""
    kernel_s: float = 0.0
    """To issue a kernel: a step takes no less than this for all of its kernels."""
    request_s: float = 0.0
    """From a client to the scheduler and back, once a request: HTTP, tokens from and to text. It delays the first
    token, but no step."""
    prompt_s: float = 0.0
    """Once a prompt that ends in a step: what its request takes of the processors that the step needs."""


@dataclass(frozen=True, kw_only=True)
class ServingConstants:
    """Physical quantities, not correction factors: the same for every model, layout and source."""

    stream: Mapping[str, float]
    """Share of the published memory bandwidth at which products of few rows read their weights, back to back: by
    generation of HBM devices, and of all with GDDR memory, which is slower for each multiprocessor and so easier to
    keep busy."""
    kv_gain: float
    """Rate at which attention gathers keys and values by page, against that of the weights."""
    uneven: float
    """Attention ends with the longest of a step's sequences: of the tokens that it holds beyond the mean, the part that
    every sequence takes longer by."""
    cache_gain: float
    """The same for query heads that read, one after the other, keys and values already in the cache."""
    held_rate: float
    """Share of an isolated kernel's arithmetic rate that a server holds, hot and with mixed work."""
    graph_kernel_s: float
    """From the end of a kernel's work to the start of the next one's, in a captured graph."""
    eager_kernel_s: float
    """The same where the host issues the kernels one by one, fast enough to stay ahead."""
    direct_rate: float
    """Share of the links' rate that reach the all-reduce kernels that read their peers' memory."""
    hosts: Mapping[str, HostTimes]
    """By `Engine.host`."""

    def stream_share(self, device: Device) -> float:
        """`stream` of a device, unless a probe has measured it."""
        if device.memory_efficiency is not None:
            return device.memory_efficiency
        return self.stream[kind_of(device)]

    def values(self) -> dict[str, float]:
        """Every number by its dotted name, like `stream.hopper` or `hosts.vllm.step_s`."""
        found: dict[str, float] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "stream":
                found |= {f"stream.{memory}": share for memory, share in value.items()}
            elif field.name == "hosts":
                found |= {
                    f"hosts.{host}.{name}": time for host, times in value.items() for name, time in vars(times).items()
                }
            else:
                found[field.name] = value
        return found

    def with_values(self, values: Mapping[str, float]) -> ServingConstants:
        """These constants with some numbers replaced, by dotted name."""
        stream, hosts = dict(self.stream), dict(self.hosts)
        plain: dict[str, float] = {}
        for name, value in values.items():
            first, _, rest = name.partition(".")
            if first == "stream":
                stream[rest] = value
            elif first == "hosts":
                host, _, time = rest.partition(".")
                hosts[host] = replace(hosts[host], **{time: value})
            else:
                plain[name] = value
        return replace(self, stream=MappingProxyType(stream), hosts=MappingProxyType(hosts), **plain)


SERVING = ServingConstants(
    # fitted by bench/fit_serving.py, but for what says otherwise
    stream=MappingProxyType(
        {
            "gddr": 0.864,
            "ampere": 0.798,
            "hopper": 0.846,
            "blackwell": 0.727,
            # no rows: made in the processes of the ones before
            "cdna3": 0.846,
            "volta": 0.798,
        }
    ),
    kv_gain=1.12,
    # measured: 0.054 to 0.069 in casys-kaist/LLMServingSim, profiler/perf/RTXPRO6000 (`alpha_default`)
    uneven=0.06,
    cache_gain=1.94,
    held_rate=0.925,
    graph_kernel_s=1.64e-06,
    eager_kernel_s=8.11e-06,
    direct_rate=0.235,
    hosts=MappingProxyType(
        {
            "fastertransformer": HostTimes(step_s=0.000254, sequence_s=5.67e-05),
            # kernel_s: read off its published rows with one sequence
            "megatron-lm": HostTimes(step_s=0.000254, sequence_s=5.67e-05, kernel_s=65e-6),
            "tensorrt-llm-static": HostTimes(step_s=0.00055, sequence_s=3.03e-06),
            "tensorrt-llm": HostTimes(step_s=0.000878, sequence_s=1.2e-05, request_s=0.0371),
            "vllm": HostTimes(step_s=0.00157, sequence_s=2.39e-05, request_s=0.0236),
            "triaxial": HostTimes(step_s=1e-3, sequence_s=20e-6),  # assumed until its server is measured
        }
    ),
)
