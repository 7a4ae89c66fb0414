"""Estimates as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from triaxial.plan.training.price import Estimate


def estimate_table(estimate: Estimate) -> Table:
    """One estimate: its totals, then seconds and GiB by part."""
    table = Table(title=str(estimate.layout), show_header=False, title_justify="left")
    table.add_row("step time", f"{estimate.step_time_s:.3f} s")
    table.add_row("tokens/s", f"{estimate.tokens_per_s:,.0f} ({estimate.tokens_per_s_per_gpu:,.0f} per GPU)")
    table.add_row("model TFLOP/s per GPU", f"{estimate.model_tflops_per_gpu:.0f} (MFU {estimate.mfu:.1%})")
    table.add_row("pipeline bubble", f"{estimate.bubble_fraction:.1%}")
    table.add_row("memory", f"{estimate.memory_gib['peak']:.1f} GiB, {'fits' if estimate.fits else 'DOES NOT FIT'}")
    table.add_section()
    for part, seconds in estimate.time_s.items():
        if seconds > 0:
            table.add_row(part, f"{seconds:.3f} s ({seconds / estimate.step_time_s:.1%})")
    for axis, seconds in estimate.hidden_s.items():
        if seconds > 0:
            table.add_row(f"hidden {axis}", f"{seconds:.3f} s behind computation")
    table.add_section()
    for part, gib in estimate.memory_gib.items():
        if part != "peak" and gib > 0:
            table.add_row(part, f"{gib:.2f} GiB")
    return table


def plans_table(plans: Sequence[Estimate]) -> Table:
    """The best layouts, best first."""
    table = Table()
    table.add_column("#", justify="right")
    table.add_column("layout", overflow="fold", min_width=30)
    for heading in ("step s", "tok/s/GPU", "MFU", "GiB", "bubble", "comm"):
        table.add_column(heading, justify="right")
    for rank, plan in enumerate(plans, start=1):
        communication = sum(seconds for part, seconds in plan.time_s.items() if part.startswith("exposed"))
        table.add_row(
            str(rank),
            str(plan.layout),
            f"{plan.step_time_s:.3f}",
            f"{plan.tokens_per_s_per_gpu:,.0f}",
            f"{plan.mfu:.1%}",
            f"{plan.memory_gib['peak']:.1f}",
            f"{plan.time_s['bubble'] / plan.step_time_s:.1%}",
            f"{communication / plan.step_time_s:.1%}",
        )
    return table
