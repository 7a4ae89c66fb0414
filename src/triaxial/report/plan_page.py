"""A plan as one self-contained page: the best layouts, where their time and memory go, and why the first wins."""

from __future__ import annotations

from html import escape

from triaxial.plan.search.plan import TrainingPlan
from triaxial.plan.training.play import play
from triaxial.report.bars import stacked_bars
from triaxial.report.timeline import timeline_svg

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1f2937 }
table { border-collapse: collapse; width: 100% } th, td { padding: .3rem .6rem; text-align: right }
th:first-child, td:first-child { text-align: left; font-family: ui-monospace, monospace; font-size: 13px }
tr + tr { border-top: 1px solid #e5e7eb } svg { width: 100%; height: auto; margin: 1rem 0 }
"""


def plan_page(plan: TrainingPlan) -> str:
    """Write the page of a plan as HTML."""
    work = plan.training
    title = f"{plan.model.name} on {plan.cluster.name}"
    labels = [str(estimate.layout) for estimate in plan.plans]
    memory = [{part: gib for part, gib in e.memory_gib.items() if part != "peak"} for e in plan.plans]
    winner = plan.plans[0].layout
    pictures = [
        stacked_bars("Seconds of a step", "s", list(zip(labels, (e.time_s for e in plan.plans)))),
        stacked_bars("Memory of the fullest GPU", "GiB", list(zip(labels, memory))),
    ]
    if winner.pp > 1:
        timeline = play(plan.model, plan.cluster, work, winner).timeline
        pictures.append(timeline_svg([(f"Pipeline of {winner}", timeline)]))
    reasons = "".join(f"<li>{escape(sentence)}</li>" for sentence in plan.why.sentences)
    return html_page(
        title,
        f"<p>Training with {work.global_batch} sequences of {work.seq_len} tokens a step in {work.precision}: "
        f"the best of {plan.considered:,} layouts.</p>\n{_table(plan)}\n<h2>Why</h2>\n<ul>{reasons}</ul>\n"
        + "\n".join(pictures),
    )


def html_page(title: str, body: str) -> str:
    """A whole page: its head with the style, its title, and `body`, which is HTML."""
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n<h1>{escape(title)}</h1>\n{body}\n</html>\n"
    )


def _table(plan: TrainingPlan) -> str:
    rows = "".join(
        f"<tr><td>{escape(str(e.layout))}</td><td>{e.step_time_s:.3f}</td><td>{e.tokens_per_s_per_gpu:,.0f}</td>"
        f"<td>{e.mfu:.1%}</td><td>{e.memory_gib['peak']:.1f}</td></tr>"
        for e in plan.plans
    )
    head = "<tr><th>layout</th><th>step, s</th><th>tokens/s per GPU</th><th>MFU</th><th>GiB</th></tr>"
    return f"<table>{head}{rows}</table>"
