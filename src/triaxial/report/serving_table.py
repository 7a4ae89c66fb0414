"""A serving estimate as a table for a terminal."""

from __future__ import annotations

from rich.table import Table

from triaxial.plan.serving.estimate import ServingEstimate


def serving_estimate_table(estimate: ServingEstimate) -> Table:
    """Its totals, then milliseconds by term of a prompt and of a decode step, then GiB by part."""
    per_gpu = estimate.output_tokens_per_s / estimate.layout.world_size
    decode, prefill = sum(estimate.decode_s.values()), sum(estimate.prefill_s.values())
    table = Table(title=f"{estimate.layout} ({estimate.engine})", show_header=False, title_justify="left")
    table.add_row("time to first token", f"{estimate.ttft_s * 1e3:,.1f} ms (mean)")
    table.add_row("time per output token", f"{estimate.tpot_s * 1e3:,.2f} ms (mean)")
    table.add_row("output tokens/s", f"{estimate.output_tokens_per_s:,.0f} ({per_gpu:,.0f} per GPU)")
    table.add_row("sequences that fit", f"{estimate.max_batch:,} per replica")
    table.add_row("memory", f"{estimate.memory_gib['peak']:.1f} GiB, {'fits' if estimate.fits else 'DOES NOT FIT'}")
    table.add_section()
    table.add_row(f"decode step, {estimate.decode_batch:.1f} sequences", f"{decode * 1e3:,.2f} ms")
    for term, seconds in estimate.decode_s.items():
        if seconds >= 0.001 * decode:
            table.add_row(f"  {term.replace('_', '-')}", f"{seconds * 1e3:,.2f} ms ({seconds / decode:.0%})")
    table.add_section()
    table.add_row("prompt alone", f"{prefill * 1e3:,.1f} ms")
    for term, seconds in estimate.prefill_s.items():
        if seconds >= 0.001 * prefill:
            table.add_row(f"  {term.replace('_', '-')}", f"{seconds * 1e3:,.1f} ms ({seconds / prefill:.0%})")
    table.add_section()
    for part, gib in estimate.memory_gib.items():
        if part != "peak":
            table.add_row(part.replace("_", " "), f"{gib:.2f} GiB")
    return table
