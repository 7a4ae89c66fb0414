"""Holds the fitted device and link costs against layer_times.csv, which they were not fitted on.

    python bench/check_layers.py ../shared/validation

A GPT layer of Megatron-LM before fused attention, as simply as can be: its products, its passes and its collectives.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

from triaxial.cluster.spec import load_cluster
from triaxial.plan.cost.collectives import collective_seconds, group_of
from triaxial.plan.cost.compute import attention_seconds, gemm_seconds, pass_seconds

CLUSTER = load_cluster("8xA100-80GB-SXM")
DEVICE = CLUSTER.device


@dataclass(frozen=True)
class Layer:
    """A GPT layer in fp16 on one of `tp` ranks, for one micro-batch."""

    hidden: int
    heads: int
    seq: int
    batch: int
    tp: int
    sequence_parallel: bool

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def products(self) -> list[tuple[int, int]]:
        """(n, k) of the projections for queries, keys and values, attention output, and both of the MLP."""
        h, cut = self.hidden, self.hidden // self.tp
        return [(3 * cut, h), (h, cut), (4 * cut, h), (h, 4 * cut)]

    def attention_s(self, backward: bool) -> float:
        heads = self.heads // self.tp
        core = attention_seconds(
            DEVICE,
            batch=self.batch,
            heads=heads,
            kv_heads=heads,
            queries=self.seq,
            keys=self.seq,
            head_dim=self.hidden // self.heads,
            precision="fp16",
            backward=backward,
            flash=False,
        )
        dropout = pass_seconds(DEVICE, 5 * self.batch * heads * self.seq**2)  # read, write and a one-byte mask
        return float(core + dropout)

    def passes_s(self) -> float:
        """Two norms (2 tensors each), two residual additions with dropout (3 and a mask), bias and GELU (2)."""
        tensor = 2 * self.tokens * self.hidden
        whole = tensor / (self.tp if self.sequence_parallel else 1)
        kernels = [2 * whole, 2 * whole, 3.5 * whole, 3.5 * whole, 2 * 4 * tensor / self.tp]
        return float(pass_seconds(DEVICE, kernels).sum())

    def collectives_s(self) -> float:
        """Two all-reduces, or with sequence parallelism as many bytes in two all-gathers and reduce-scatters."""
        group = group_of(CLUSTER, {"tp": self.tp}, "tp")
        return 2 * float(collective_seconds(CLUSTER, "all_reduce", 2 * self.tokens * self.hidden, group))

    def forward_s(self) -> float:
        products = sum(float(gemm_seconds(DEVICE, self.tokens, n, k, "fp16")) for n, k in self.products)
        return products + self.attention_s(backward=False) + self.passes_s() + self.collectives_s()

    def input_gradient_s(self) -> float:
        products = sum(float(gemm_seconds(DEVICE, self.tokens, k, n, "fp16")) for n, k in self.products)
        return products + self.attention_s(backward=True) + 1.5 * self.passes_s() + self.collectives_s()

    def weight_gradient_s(self) -> float:
        return sum(float(gemm_seconds(DEVICE, k, n, self.tokens, "fp16")) for n, k in self.products)


def layers_of(row: dict[str, str]) -> float:
    """Layers that a row's time covers. The zero-bubble stages share out the layers and, as one layer each, the
    embedding and the head (arXiv 2401.10241, section 5.1)."""
    if "stage of" not in row["scope"]:
        return 1
    return (int(row["layers"]) + 2) / int(row["scope"].split("stage of ")[1].split(",")[0])


def predicted_ms(row: dict[str, str]) -> dict[str, float]:
    """Milliseconds by the column that measured them."""
    sizes = (int(row[name]) for name in ("hidden", "heads", "seq_len", "micro_batch", "tp"))
    layer = Layer(*sizes, sequence_parallel=row["sp"] == "1")
    forward = layer.forward_s()
    recomputed = {"none": 0.0, "selective": layer.attention_s(backward=False), "full": forward}[row["recompute"]]
    input_gradient, weight_gradient = layer.input_gradient_s() + recomputed, layer.weight_gradient_s()
    seconds = {
        "fwd_ms": forward,
        "bwd_ms": input_gradient + weight_gradient,
        "bwd_input_ms": input_gradient,
        "bwd_weight_ms": weight_gradient,
    }
    return {column: value * layers_of(row) * 1e3 for column, value in seconds.items()}


def main(folder: Path) -> None:
    with (folder / "layer_times.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    print("| row | model | column | measured | predicted | error % |\n|---|---|---|---:|---:|---:|")
    for row in rows:
        for column, predicted in predicted_ms(row).items():
            if row[column]:
                measured = float(row[column])
                error = 100 * (predicted / measured - 1)
                print(f"| {row['id']} | {row['model']} | {column} | {measured:.2f} | {predicted:.2f} | {error:+.1f} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
