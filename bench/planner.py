"""How fast layouts are priced, and a whole question answered, against llm-analysis from PyPI.

    python -m venv /some/where && /some/where/bin/pip install --no-deps llm-analysis fire termcolor
    python bench/planner.py --peer-python /some/where/bin/python

Both price the same 175B model on 1,024 A100s in processes of their own on one core. The peer has one efficiency for
all products and one bandwidth for all collectives; it lists no layouts itself, so it is handed tp x pp x dp x mb.
Wall and processor time count from before the interpreter starts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import click

OURS = """
import json, time
from triaxial.cluster.spec import load_cluster
from triaxial.model.spec import load_model_spec
from triaxial.plan.search.best import search
from triaxial.plan.workload import Training
model, cluster = load_model_spec("{model}"), load_cluster("{cluster}")
start = time.perf_counter()
found = search(model, cluster, Training(global_batch={batch}, seq_len={seq_len}))
end = time.perf_counter()
print(json.dumps(dict(layouts=found.considered, priced=found.priced, search_s=end - start, cpu_s=time.process_time())))
"""

PEER = """
import json, logging, time
from llm_analysis.analysis import LLMAnalysis, ActivationRecomputation
from llm_analysis.config import *
from llm_analysis.logger import logger
logger.setLevel(logging.CRITICAL)
start = time.perf_counter()
count, sizes = 0, [2 ** n for n in range(11)]
for tp in sizes[:4]:
    for pp in [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96]:
        if 1024 % (tp * pp):
            continue
        dp = 1024 // (tp * pp)
        for mb in sizes:
            if 2048 % (dp * mb):
                continue
            for recompute in ActivationRecomputation:
                parallel = ParallelismConfig(tp_size=tp, pp_size=pp, dp_size=dp)
                analysis = LLMAnalysis(get_model_config_by_name("facebook_opt-175b"),
                                       get_gpu_config_by_name("a100-sxm-80gb"), DtypeConfig(), parallel,
                                       flops_efficiency=0.5, hbm_memory_efficiency=0.8)
                try:
                    analysis.training(batch_size_per_gpu=mb, global_batch_size=2048, seq_len=2048,
                                      activation_recomputation=recompute)
                except AssertionError:
                    continue
                count += 1
end = time.perf_counter()
print(json.dumps(dict(layouts=count, priced=count, search_s=end - start, cpu_s=time.process_time())))
"""

QUESTIONS = (
    {"model": "gpt3-175b", "cluster": "128x8xA100", "batch": 2048, "seq_len": 2048},
    {"model": "llama-3.1-70b", "cluster": "4x8xH100-SXM", "batch": 1024, "seq_len": 8192},
    {"model": "llama-3.1-405b", "cluster": "2048x8xH100-SXM", "batch": 2048, "seq_len": 8192},
)


def timed(python: str, script: str) -> dict[str, float]:
    """Run a script in a process of its own; the wall time counts from before the interpreter starts."""
    start = time.perf_counter()
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
    return {**json.loads(done.stdout.splitlines()[-1]), "wall_s": time.perf_counter() - start}


def show(name: str, figures: dict[str, float]) -> tuple[float, float]:
    """Print a row; return layouts decided, and layouts whose time was computed, per second."""
    decided, priced = (figures[key] / figures["search_s"] for key in ("layouts", "priced"))
    print(
        f"{name:42s} {figures['layouts']:>10,.0f} {figures['priced']:>9,.0f} {figures['search_s']:>9.2f} "
        f"{figures['wall_s']:>8.2f} {figures['cpu_s']:>7.2f} {decided:>12,.0f} {priced:>10,.0f}"
    )
    return decided, priced


@click.command()
@click.option("--peer-python", metavar="PYTHON", help="interpreter of an environment with llm-analysis")
def main(peer_python: str | None) -> None:
    """How fast layouts are priced, and a whole question answered, against llm-analysis from PyPI."""
    headings = f"{'layouts':>10s} {'priced':>9s} {'search s':>9s} {'wall s':>8s} {'cpu s':>7s} {'layouts/s':>12s} {'priced/s':>10s}"
    print(f"{'':42s} {headings}")
    rates = [
        show(f"triaxial {question['model']} on {question['cluster']}", timed(sys.executable, OURS.format(**question)))
        for question in QUESTIONS
    ]
    if peer_python:
        peer = show("llm-analysis opt-175b on 1,024 A100", timed(peer_python, PEER))
        decided, priced = (ours / theirs for ours, theirs in zip(rates[0], peer))
        print(f"ratio on the same question: {decided:,.0f} in layouts decided, {priced:,.0f} in layouts priced")


if __name__ == "__main__":
    main()
