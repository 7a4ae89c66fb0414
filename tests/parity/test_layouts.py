"""Every layout trains exactly as one process does: loss, gradient norm, gradients and initial values."""

from __future__ import annotations

from itertools import product

import pytest

from tests.parity.training import Case, assert_same, reference, tiny_spec, train_everywhere, train_over_gloo
from tests.world import World
from triaxial.plan.layout import Layout, parse_layout

SPEC = tiny_spec(num_layers=7, num_heads=8, head_dim=8, vocab=103)


def all_layouts() -> list[Layout]:
    """Every (tp, pp, dp) of 1, 2, 4 and 8 processes, both schedules, with and without SP, each DP kind."""
    layouts = []
    for tp, pp, dp in product((1, 2, 4, 8), repeat=3):
        if tp * pp * dp > 8:
            continue
        schedules = ("1f1b", "gpipe") if pp > 1 else ("1f1b",)
        shards = [0] + [n for n in (2, 4) if n < dp]
        kinds = [(0, 0)] + [(zero, shard) for zero in (1, 2, 3) for shard in shards if dp > 1]
        mb = max(1, 2 // dp)  # one to four micro-batches
        for schedule, sp, (zero, shard) in product(schedules, {False, tp > 1}, kinds):
            layouts.append(Layout(tp=tp, pp=pp, dp=dp, mb=mb, schedule=schedule, sp=sp, zero=zero, shard=shard))
    return layouts


@pytest.mark.parametrize("layout", all_layouts(), ids=str)
def test_training_is_the_same_under_every_layout(world: World, layout: Layout) -> None:
    case = Case(SPEC)
    assert_same(train_everywhere(world, case, layout), reference(world, case))


@pytest.mark.parametrize("order", ["pp-dp-cp-tp", "dp-tp-cp-pp", "cp-pp-tp-dp"])
def test_any_order_of_axes_on_the_ranks(world: World, order: str) -> None:
    case = Case(SPEC)
    layout = parse_layout(f"tp=2,pp=2,dp=2,zero=3,sp=1,order={order}")
    assert_same(train_everywhere(world, case, layout), reference(world, case))


@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("mb", [1, 2, 4, 8])
def test_micro_batches_and_accumulation_do_not_change_the_gradient(world: World, dp: int, mb: int) -> None:
    """At one global batch: 1, 2, 4 or 8 sequences a micro-batch, so 1 to 8 micro-batches accumulate."""
    case = Case(tiny_spec())
    if dp * mb > case.global_batch:
        pytest.skip("fewer samples than one micro-batch on each replica")
    for schedule in ("1f1b", "gpipe"):
        layout = Layout(pp=2, dp=dp, mb=mb, schedule=schedule)
        assert_same(train_everywhere(world, case, layout), reference(world, case))


@pytest.mark.parametrize("text", ["dp=4", "dp=2,zero=3,mb=2", "pp=2,dp=2", "tp=2,pp=2,dp=2,zero=2,sp=1", "pp=4,mb=4"])
def test_unevenly_ignored_labels_equal_the_mean_over_valid_tokens(world: World, text: str) -> None:
    case = Case(tiny_spec(), ignore_unevenly=True)
    assert_same(train_everywhere(world, case, parse_layout(text)), reference(world, case))


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "tp=2",
        "pp=2",
        "tp=2,pp=2",
        "dp=2,zero=1",
        "dp=2,zero=2",
        "dp=2,zero=3",
        "pp=2,dp=2,zero=3",
        "tp=2,pp=2,dp=2,zero=2",
    ],
)
def test_tied_embeddings_and_biases(world: World, text: str, qk_norm: bool) -> None:
    spec = tiny_spec(tied_embeddings=True, qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=qk_norm)
    case = Case(spec, seq_len=18)
    assert_same(train_everywhere(world, case, parse_layout(text + ",mb=2")), reference(world, case))


@pytest.mark.parametrize("text", ["tp=4", "tp=4,sp=1", "tp=4,dp=2,zero=3", "tp=4,pp=2,sp=1"])
def test_fewer_kv_heads_than_tensor_ranks(world: World, text: str) -> None:
    case = Case(tiny_spec(num_kv_heads=2, qkv_bias=True, qk_norm=True), seq_len=24)
    assert_same(train_everywhere(world, case, parse_layout(text + ",mb=2")), reference(world, case))


@pytest.mark.parametrize("vocab", [17, 101, 127])
@pytest.mark.parametrize("text", ["tp=2", "tp=4", "tp=4,sp=1"])
def test_odd_vocabularies_are_padded_without_a_trace(world: World, vocab: int, text: str) -> None:
    case = Case(tiny_spec(vocab=vocab, num_layers=1), seq_len=20, steps=3)
    assert_same(train_everywhere(world, case, parse_layout(text + ",mb=4")), reference(world, case))


@pytest.mark.parametrize("window", [2, 5])
def test_sliding_windows(world: World, window: int) -> None:
    case = Case(tiny_spec(sliding_window=window, first_windowed_layer=1))
    assert_same(train_everywhere(world, case, parse_layout("tp=2,pp=2,mb=2")), reference(world, case))


@pytest.mark.parametrize("text", ["tp=2,pp=2,dp=2,zero=3,sp=1", "tp=2,sp=1", "dp=2,zero=1"])
def test_the_same_layout_twice_and_recompute_are_bitwise_equal(world: World, text: str) -> None:
    case = Case(SPEC, steps=3)
    first = train_everywhere(world, case, parse_layout(text + ",mb=2"))
    for recompute in ("none", "selective", "full"):
        again = train_everywhere(world, case, parse_layout(f"{text},mb=2,recompute={recompute}"))
        assert_same(again, first, tolerance=0)


@pytest.mark.parametrize(
    "text", ["tp=2,sp=1", "tp=4", "dp=2,zero=1", "dp=4,zero=3,shard=2", "tp=2,pp=2,dp=2,zero=2,sp=1"]
)
def test_ranks_on_different_hosts_compute_the_same(world: World, text: str) -> None:
    case = Case(tiny_spec(tied_embeddings=True), steps=3)
    assert_same(
        train_everywhere(world, case, parse_layout(text + ",mb=2"), job=train_over_gloo), reference(world, case)
    )
