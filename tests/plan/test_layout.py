"""A layout is one value with one spelling, and one that cannot be run is refused in one sentence."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triaxial import BadInput
from triaxial.model.spec import ModelSpec, load_model_spec
from triaxial.plan.layout import (
    AXES,
    Layout,
    Recompute,
    ScheduleKind,
    check_layout,
    micro_batches,
    parse_layout,
)

SPEC = ModelSpec(
    name="odd",
    family="llama",
    num_layers=5,
    hidden=48,
    num_heads=12,
    num_kv_heads=4,
    head_dim=4,
    ffn=96,
    vocab=101,
    max_positions=64,
)

sizes = st.integers(1, 8)
layouts = st.fixed_dictionaries(
    {"tp": sizes, "pp": sizes, "dp": sizes, "mb": sizes},
    optional={
        "cp": sizes,
        "ep": sizes,
        "vpp": st.integers(1, 3),
        "schedule": st.sampled_from(get_args(ScheduleKind)),
        "zero": st.integers(0, 3),
        "shard": st.integers(0, 8),
        "sp": st.booleans(),
        "recompute": st.sampled_from(get_args(Recompute)),
        "cut": st.lists(sizes, max_size=6).map(tuple),
        "order": st.permutations(AXES).map("-".join),
    },
)


def layout_or_none(**fields: Any) -> Layout | None:
    try:
        return Layout(**fields)
    except BadInput:
        return None


# ---- text form


def test_text_names_what_differs_from_the_defaults() -> None:
    assert str(Layout()) == "tp=1,pp=1,dp=1,mb=1"
    layout = Layout(tp=8, pp=4, dp=2, sp=True, zero=3, cut=(9, 8, 8, 9), order="pp-tp-cp-dp", schedule="zb-h1")
    assert str(layout) == "tp=8,pp=4,dp=2,mb=1,schedule=zb-h1,zero=3,sp=1,cut=9+8+8+9,order=pp-tp-cp-dp"


def test_long_cuts_are_written_by_runs() -> None:
    cut = (3, *(2,) * 6, 3)
    assert str(Layout(pp=8, cut=cut)) == "tp=1,pp=8,dp=1,mb=1,cut=3+2*6+3"
    assert parse_layout("pp=8,cut=3+2*6+3").cut == cut


def test_text_is_read_in_any_order_and_spacing() -> None:
    assert parse_layout(" dp = 2 , tp=8,") == Layout(tp=8, dp=2)
    assert parse_layout("") == Layout()


@given(layouts)
def test_text_round_trips(fields: dict[str, Any]) -> None:
    layout = layout_or_none(**fields)
    if layout is not None:
        assert parse_layout(str(layout)) == layout
        assert str(parse_layout(str(layout))) == str(layout)


WORDS = st.sampled_from(
    [*Layout.__dataclass_fields__, *get_args(ScheduleKind), "=", ",", "+", "-", " ", "0", "1", "9" * 4000]
)


@given(st.text() | st.lists(WORDS | st.integers().map(str) | st.text(max_size=2), max_size=16).map("".join))
def test_any_text_is_a_layout_or_bad_input(text: str) -> None:
    try:
        layout = parse_layout(text)
    except BadInput:
        return
    assert parse_layout(str(layout)) == layout


@given(
    st.dictionaries(st.sampled_from([*Layout.__dataclass_fields__]), st.integers() | st.text(max_size=4), max_size=6)
)
def test_any_values_are_a_layout_or_bad_input(values: dict[str, Any]) -> None:
    text = ",".join(f"{key}={value}" for key, value in values.items())
    try:
        layout = parse_layout(text)
    except BadInput:
        return
    assert parse_layout(str(layout)) == layout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp", "layout: 'tp' is not KEY=VALUE with KEY one of tp, pp, dp, cp"),
        ("gpus=8", "layout: 'gpus=8' is not KEY=VALUE with KEY one of"),
        ("world_size=8", "'world_size=8' is not KEY=VALUE"),
        ("tp=2,tp=2", "layout: tp is given twice"),
        ("tp=two", "layout: tp='two' must be a whole number"),
        ("tp=1.5", "layout: tp='1.5' must be a whole number"),
        ("sp=yes", "layout: sp='yes' must be 0 or 1"),
        ("cut=3+x", "layout: cut='3+x' must be whole numbers joined by +, like 3+2*5"),
        ("pp=2,cut=1*", "layout: cut='1*' must be whole numbers"),
        ("pp=2,cut=1*0", "layout: cut='1*0' must be whole numbers"),
        ("pp=2,cut=1*2*1", "layout: cut='1*2*1' must be whole numbers"),
        ("tp=0", "layout: tp must be 1 to 1048576, not 0"),
        ("dp=99999999", "layout: dp must be 1 to 1048576, not 99999999"),
        ("zero=4", "layout: zero must be 0, 1, 2 or 3, not 4"),
        ("schedule=1f2b", "layout: schedule must be one of gpipe, 1f1b, interleaved, zb-h1, zb-h2, zb-v, not '1f2b'"),
        ("recompute=some", "layout: recompute must be one of none, selective, full, not 'some'"),
        ("order=tp-pp", "layout: order must name tp, cp, dp, pp once each, like tp-cp-dp-pp, not 'tp-pp'"),
        ("dp=4,shard=2", "layout: shard=2 needs zero >= 1 and must divide dp=4"),
        ("dp=4,zero=2,shard=3", "layout: shard=3 needs zero >= 1 and must divide dp=4"),
        ("dp=4,zero=2,shard=-2", "layout: shard=-2 needs zero >= 1 and must divide dp=4"),
        ("dp=2,cp=2,ep=3", "layout: ep=3 must divide dp*cp=4, or be so many times a divisor of tp=1"),
        ("pp=2,schedule=interleaved", "layout: schedule=interleaved needs vpp of at least 2"),
        ("pp=2,schedule=zb-v", "schedule=zb-v places two stages on each rank: vpp must be 2, not 1"),
        ("pp=1,vpp=3,schedule=zb-v", "schedule=zb-v places two stages on each rank: vpp must be 2, not 3"),
        ("pp=2,vpp=2", "layout: vpp=2 needs schedule=interleaved or zb-v, not 1f1b"),
        ("pp=2,cut=3", "layout: cut must give each of 2 stages at least 1 block, not (3,)"),
        ("pp=2,cut=3+0", "layout: cut must give each of 2 stages at least 1 block, not (3, 0)"),
    ],
)  # fmt: skip
def test_bad_text_is_one_sentence(text: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_layout(text)
    assert message in str(caught.value)


# ---- meaning


def test_sizes_that_follow() -> None:
    layout = Layout(tp=2, pp=3, dp=4, vpp=2, schedule="interleaved", zero=1, shard=2)
    assert (layout.world_size, layout.num_stages, layout.shard_size) == (24, 6, 2)
    assert (Layout(dp=4).shard_size, Layout(dp=4, zero=2).shard_size) == (1, 4)


def test_one_meaning_has_one_spelling() -> None:
    assert Layout(sp=True) == Layout()
    assert Layout(dp=4, zero=1, shard=4) == Layout(dp=4, zero=1)


@given(layouts, st.integers(-5, 500))
def test_micro_batches_cover_the_global_batch_or_name_one_that_fits(fields: dict[str, Any], global_batch: int) -> None:
    layout = layout_or_none(**fields)
    if layout is None:
        return
    try:
        count = micro_batches(layout, global_batch)
    except BadInput as error:
        nearest = int(str(error).rpartition(" ")[2])
        assert micro_batches(layout, nearest) >= 1
    else:
        assert count * layout.dp * layout.mb == global_batch


# ---- a layout against a model


@pytest.mark.parametrize(
    ("text", "seq_len", "message"),
    [
        ("tp=5", 16, "tp=5 cannot cut odd (12 heads, 4 kv heads, ffn 96); valid: 1, 2, 4, 12"),
        ("tp=6", 16, "tp=6 cannot cut odd"),
        ("tp=24", 16, "tp=24 cannot cut odd"),
        ("tp=4,sp=1", 18, "sequence parallelism needs a sequence length divisible by tp=4, not 18"),
        ("pp=8", 16, "8 stages are more than the 7 blocks (embedding, layers, head) of odd"),
        ("pp=2,cut=3+3", 16, "cut 3+3 covers 6 of 7 blocks (embedding, layers, head)"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(text: str, seq_len: int, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        check_layout(parse_layout(text), SPEC, seq_len)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["tp=12", "tp=2,sp=1", "pp=7", "pp=3,cut=1+5+1", "tp=4,pp=3,dp=2,mb=4"])
def test_a_model_that_fits_is_accepted(text: str) -> None:
    check_layout(parse_layout(text), SPEC, 16)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("llama-3.1-405b", "tp=8,pp=16,dp=8"),
        ("qwen2.5-7b", "tp=4"),
        ("gpt3-175b", "tp=8,pp=12,vpp=8,schedule=interleaved"),
    ],
)
def test_layouts_from_papers_fit_their_models(model: str, text: str) -> None:
    check_layout(parse_layout(text), load_model_spec(model), 2048)
