"""The layout of a world that has lost ranks, or got them back."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from triaxial import BadInput
from triaxial.cli.train import command
from triaxial.model.spec import load_model_spec
from triaxial.plan.layout import Layout, check_layout, micro_batches, parse_layout
from triaxial.train.config import TrainConfig, make_config
from triaxial.train.elastic import fit_to_world, layout_for_world

SPEC = load_model_spec("llama-3.1-8b")
SEQ = 4096

# layout of the whole world, ranks of a node, ranks that there are, global batch -> layout
EXPECTED = {
    ("tp=8,dp=4", 8, 24, 96): "tp=8,dp=3",  # a node of four is gone
    ("tp=8,dp=2", 8, 8, 64): "tp=8",
    ("tp=8,dp=2", 8, 32, 64): "tp=8,dp=4",
    ("tp=2,pp=2,dp=2,zero=2", 4, 4, 8): "tp=2,pp=2,dp=1,zero=2",
    ("tp=2,pp=2", 2, 2, 8): "tp=2,pp=1",  # tp first: it stays within the node
    ("tp=1,pp=4", 2, 2, 8): "tp=1,pp=2",
    ("tp=4,pp=2,dp=2", 4, 12, 48): "tp=4,pp=3",  # 12 ranks do not hold two whole models of 8
    ("tp=8,dp=2", 4, 4, 16): "tp=4",  # tp that crossed nodes no longer does
    ("tp=1,dp=4,mb=4", 1, 8, 16): "tp=1,dp=8,mb=2",  # the global batch of 16 asks for it
    ("tp=1,dp=4", 1, 3, 8): "tp=1,pp=3",  # 3 does not divide the global batch
    ("tp=1,dp=8,zero=3,shard=4", 4, 4, 8): "tp=1,dp=4,zero=3,shard=4",
    ("tp=1,dp=8,zero=3,shard=4", 2, 2, 8): "tp=1,dp=2,zero=3",
    ("tp=1,pp=4,dp=2,schedule=zb-v,vpp=2", 4, 4, 8): "tp=1,pp=4,schedule=zb-v,vpp=2",
    ("tp=2,pp=2,cut=20+14", 2, 2, 8): "tp=2,pp=1",
    ("tp=2,pp=2,dp=2,cut=20+14", 2, 4, 8): "tp=2,pp=2,cut=20+14",
}


@pytest.mark.parametrize("case", EXPECTED, ids=str)
def test_the_nearest_layout_is_taken(case: tuple[str, int, int, int]) -> None:
    layout, node, world, batch = case
    assert layout_for_world(SPEC, parse_layout(layout), world, node, batch, SEQ) == parse_layout(EXPECTED[case])


def test_the_whole_world_has_the_given_layout_whatever_it_is() -> None:
    layout = parse_layout("tp=16,pp=2,mb=2,schedule=zb-h1,recompute=full")
    assert layout_for_world(SPEC, layout, 32, 8, 8, SEQ) is layout


def test_a_world_that_no_layout_fits_is_refused() -> None:
    with pytest.raises(BadInput, match=r"no layout of 37 ranks can train llama-3\.1-8b with a global batch of 8 seq"):
        layout_for_world(SPEC, parse_layout("tp=1,dp=8"), 37, 1, 8, SEQ)


def elastic_run(out: Path, **settings: Any) -> TrainConfig:
    job = {"model": "tiny-byte", "data": "text", "layout": "tp=2,pp=2", "elastic": True, "out": out}
    return make_config(job | settings)


def test_a_run_is_fitted_and_nothing_but_its_layout_changes(tmp_path: Path) -> None:
    config = elastic_run(tmp_path)
    assert config.resume, "it goes on where it was, if it was"
    assert fit_to_world(config, 4, 2, 2) == config.model_copy(update={"layout": "tp=2,pp=2,dp=1,mb=1"})
    assert fit_to_world(config, 2, 1, 2) == config.model_copy(update={"layout": "tp=2,pp=1,dp=1,mb=1"})


def test_nodes_with_unequally_many_ranks_are_refused_on_all_of_them(tmp_path: Path) -> None:
    """Or each would find a layout of its own."""
    for ranks in (4, 2):
        with pytest.raises(BadInput, match=f"2 nodes have 6 ranks in all and one of them {ranks}: give each as many"):
            fit_to_world(elastic_run(tmp_path), 6, 2, ranks)


def test_a_schedule_table_is_refused_for_it_fits_one_layout(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"own\.json is for one layout: leave it out, or elastic"):
        elastic_run(tmp_path, schedule_table=Path("own.json"))


def test_a_folder_must_be_given(tmp_path: Path) -> None:
    """One that has the time in its name would be another at every start."""
    done = CliRunner().invoke(command, ["tiny-byte", "--data", str(tmp_path), "--elastic"])
    assert str(done.exception) == "elastic goes on with the run in --out, the same at every start: give it"


sizes = st.sampled_from([1, 2, 3, 4])


@given(tp=sizes, pp=sizes, dp=sizes, mb=sizes, node=st.sampled_from([1, 2, 4, 6]), nodes=st.integers(1, 6), rest=sizes)
@settings(max_examples=150, deadline=None)
def test_a_layout_is_found_exactly_if_there_is_one(
    tp: int, pp: int, dp: int, mb: int, node: int, nodes: int, rest: int
) -> None:
    """It is legal, keeps the global batch and its tp within a node, and holds as little a rank as before if any does."""
    layout, world, batch = Layout(tp=tp, pp=pp, dp=dp, mb=mb), nodes * node, dp * mb * rest
    legal = [shape for shape in product(range(1, world + 1), repeat=3) if fits(*shape, world, node, batch)]
    if layout.world_size == world:
        return
    if not legal:
        with pytest.raises(BadInput):
            layout_for_world(SPEC, layout, world, node, batch, SEQ)
        return
    found = layout_for_world(SPEC, layout, world, node, batch, SEQ)
    assert (found.tp, found.pp, found.dp) in legal
    assert micro_batches(found, batch) * found.dp * found.mb == batch
    assert mb % found.mb == 0
    finest = max(min(t * p, tp * pp) for t, p, _ in legal)
    assert min(found.tp * found.pp, tp * pp) == finest


def fits(tp: int, pp: int, dp: int, world: int, node: int, batch: int) -> bool:
    """A layout of micro-batches of one sequence, checked without what is tested."""
    if tp * pp * dp != world or node % tp or batch % dp:
        return False
    try:
        check_layout(Layout(tp=tp, pp=pp, dp=dp), SPEC, SEQ)
    except BadInput:
        return False
    return True
