"""Does the parity suite notice? Break the runtime in one place at a time and see that the tests fail.

Each mutation replaces one piece of source text in a copy of the package and runs the parity tests against the copy.
Usage: python bench/mutations.py [--markdown FILE]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
from rich.progress import track

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutation:
    """One fault: `old` becomes `new` in `file`; `tests` should notice (a pytest -k expression)."""

    what: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = [
    Mutation(
        "nothing (control: the tests must pass)",
        "parallel/tensor.py",
        "import torch\n",
        "import torch\n",
        "any_order or twice",
    ),
    Mutation(
        "forward all-reduce of row-parallel layers removed",
        "parallel/tensor.py",
        "if self.sequence_parallel else self.axis.all_reduce(x)",
        "if self.sequence_parallel else x",
        "fewer_kv_heads",
    ),
    Mutation(
        "backward all-reduce of column-parallel layers removed",
        "parallel/tensor.py",
        "else tp.axis.all_reduce_async(dn)",
        "else Pending(tp.axis, '', lambda: dn)",
        "fewer_kv_heads",
    ),
    Mutation(
        "two stages swapped: a layer of one where the other's should be",
        "parallel/program.py",
        "for index in range(*bounds[stage])",
        "for index in range(*bounds[stage]) for index in [{2: 6, 6: 2}.get(index, index) if layout.pp > 1 else index]",
        "any_order",
    ),
    Mutation(
        "loss scaled by the number of micro-batches",
        "train/step.py",
        "scale = (1.0 / total)",
        "scale = (mb / len(ids) / total)",
        "micro_batches_and_accumulation",
    ),
    Mutation(
        "one stage dropped from the gradient norm",
        "parallel/data.py",
        "if not norms or mesh.replicate.index:",
        "if not norms or mesh.replicate.index or mesh.pp.index:",
        "any_order",
    ),
    Mutation(
        "replicated parameters counted on every tensor rank",
        "parallel/data.py",
        "piece.counted and self.counts",
        "self.counts",
        "any_order",
    ),
    Mutation(
        "second copy of a tied embedding counted in the norm",
        "parallel/program.py",
        "tied.counts = False",
        "pass",
        "tied",
    ),
    Mutation(
        "gradients of a tied embedding not added up",
        "parallel/data.py",
        "mesh.ends.all_reduce(tied.gradient)",
        "pass",
        "tied",
    ),
    Mutation(
        "shared kv heads' gradients not added up",
        "parallel/data.py",
        "for axis in (mesh.tp, mesh.kv):",
        "for axis in (mesh.tp,):",
        "fewer_kv_heads",
    ),
    Mutation(
        "norm gradients not added up under sequence parallelism",
        "parallel/data.py",
        "for axis in (mesh.tp, mesh.kv):",
        "for axis in (mesh.kv,):",
        "any_order",
    ),
    Mutation(
        "hybrid sharding: shards not added up over replicas",
        "parallel/data.py",
        "if mesh.shard.size > 1:",
        "if False:",
        "every_layout and shard",
    ),
    Mutation(
        "mean over each replica's own valid tokens",
        "train/step.py",
        "total = mesh.dp.all_reduce(valid).clamp(min=1)",
        "total = valid.clamp(min=1) * mesh.dp.size",
        "unevenly",
    ),
    Mutation(
        "ZeRO-3 uses parameters of the step before",
        "parallel/data.py",
        "self._gathering = self.shard.all_gather_async(self._mine, out=whole)",
        "self._old = self._mine.clone() if not hasattr(self, '_old') else self._old; "
        "self._gathering = self.shard.all_gather_async(self._old, out=whole)",
        "any_order",
    ),
]


def run(mutation: Mutation) -> str:
    """`failed` or `passed`: what the chosen parity tests say of the mutated package."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        target = source / "triaxial" / mutation.file
        text = target.read_text()
        if text.count(mutation.old) < 1:
            raise SystemExit(f"{mutation.file} no longer holds {mutation.old!r}: update {Path(__file__).name}")
        if "Pending(" in mutation.new:
            text = text.replace("mesh import Axis", "mesh import Axis, Pending")
        target.write_text(text.replace(mutation.old, mutation.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "tests/parity/test_layouts.py"]
        environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, "-k", mutation.tests], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode not in (0, 1):
            raise SystemExit(done.stdout + done.stderr)
        return "passed" if done.returncode == 0 else "failed"


@click.command()
@click.option("--markdown", type=click.Path(path_type=Path), help="Write the table here too.")
def main(markdown: Path | None) -> None:
    """Run every mutation; exit with 1 if one goes unnoticed."""
    rows = ["| what is broken | parity tests | as it should be |", "|---|---|---|"]
    unnoticed = 0
    for place, mutation in enumerate(track(MUTATIONS, description="mutations")):
        outcome = run(mutation)
        right = outcome == ("passed" if place == 0 else "failed")
        unnoticed += not right
        rows.append(f"| {mutation.what} | {outcome} | {'yes' if right else '**no**'} |")
    table = "\n".join(rows) + "\n"
    print(table)
    if markdown is not None:
        markdown.write_text(table)
    sys.exit(1 if unnoticed else 0)


if __name__ == "__main__":
    main()
