"""Which path is taken, by a table and without one."""

from __future__ import annotations

import pytest

from lte.ops.paths import (
    MEASURED,
    BreakEven,
    ExpectedUse,
    FfnKind,
    break_even,
    choose_path,
    expected_union,
    expected_uses,
    explain_path,
    propose_rows,
)

ROWS = (
    BreakEven(tokens=1, decode=1.0),
    BreakEven(tokens=16, decode=0.6),
    BreakEven(tokens=256),
    BreakEven(tokens=8192, grouped=0.25),
)
LARGE = 2 * 10**8
TABLE = {FfnKind(90, 2, True, LARGE): ROWS}


def choose(tokens: int, fraction: float | None, arch: int = 90, gated: bool = True) -> str:
    return choose_path(FfnKind(arch, 2, gated, LARGE), tokens, fraction, TABLE)


def test_one_token_is_decoded_whatever_is_known() -> None:
    assert choose(1, None) == choose(1, 1.0) == choose(1, 0.0) == "decode"
    assert choose_path(FfnKind(80, 4, False, LARGE), 1) == "decode"


def test_decode_goes_by_the_union_of_the_tokens() -> None:
    assert expected_union(4, 0.2) == pytest.approx(0.5904)
    assert choose(4, 0.2) == "decode"
    assert choose(4, 0.21) == "masked"
    assert choose(16, 0.05) == "decode"
    assert choose(17, 0.001) == "masked"


def test_a_measured_union_takes_the_place_of_independence() -> None:
    kind = FfnKind(90, 2, True, LARGE)
    assert choose_path(kind, 4, 0.3, TABLE) == choose_path(kind, 4, 0.1, TABLE, union=0.61) == "masked"
    assert choose_path(kind, 4, 0.3, TABLE, union=0.6) == "decode"
    assert choose_path(kind, 300, 0.25, TABLE, union=1.0) == "grouped"
    assert "30% of the experts active per token, 60% for any of 4" in explain_path(kind, 4, 0.3, TABLE, union=0.6)


def test_experts_that_are_always_on_count_half_for_grouped() -> None:
    kind = FfnKind(90, 2, True, LARGE)
    limit = next(row.grouped for row in TABLE[kind] if row.tokens >= 300)
    assert choose_path(kind, 300, limit, TABLE) == "grouped"
    assert choose_path(kind, 300, limit + 0.09, TABLE) == "masked"
    assert choose_path(kind, 300, limit + 0.09, TABLE, core=0.2) == "grouped"
    assert choose_path(kind, 300, limit + 0.11, TABLE, core=0.2) == "masked"
    assert "20% always on, which count 0.5 for grouped" in explain_path(kind, 300, 0.3, TABLE, core=0.2)


def test_unions_of_numbers_between_those_that_were_measured() -> None:
    use = ExpectedUse(0.2, texts=((2, 0.3), (8, 0.6)), row=((4, 0.25),))
    assert [use.union(tokens) for tokens in (1, 2, 3, 8)] == [pytest.approx(0.2), 0.3, 0.6, 0.6]
    assert use.union(9) == expected_union(9, 0.2)
    assert [use.union(tokens, in_a_row=True) for tokens in (1, 2, 4)] == [pytest.approx(0.2), 0.25, 0.25]
    assert use.union(5, in_a_row=True) == 0.6  # as of texts
    assert (
        ExpectedUse(0.2, row=((2, 0.3),)).union(5, in_a_row=True) == ExpectedUse(0.2).union(5) == expected_union(5, 0.2)
    )


def test_what_a_measurement_says_of_each_layer() -> None:
    unions = {"texts": {"16": [0.9, 0.8], "2": [0.4, 0.3]}, "row": {"2": [0.35, 0.25], "4": [0.5]}}
    measured = {"active_fraction": [0.25, 0.2], "union_fraction": unions}
    assert expected_uses(measured, 2) == [
        ExpectedUse(0.25, ((2, 0.4), (16, 0.9)), ((2, 0.35),)),
        ExpectedUse(0.2, ((2, 0.3), (16, 0.8)), ((2, 0.25),)),
    ]
    assert expected_uses({"active_fraction": [0.25], "union_fraction": None}, 1) == [ExpectedUse(0.25)]
    assert expected_uses(measured, 3) == expected_uses(None, 3) == [None] * 3


def test_grouped_goes_by_the_fraction_of_one_token() -> None:
    assert choose(257, 0.25) == "grouped"
    assert choose(257, 0.26) == "masked"
    assert choose(256, 0.1) == "masked"
    assert choose(10**6, 0.2) == "grouped"


def test_the_unknown_is_safe() -> None:
    for tokens in (2, 16, 300, 8192):
        assert choose(tokens, None) == "masked"
        assert choose(tokens, 0.1, gated=False) == "masked"
        assert choose(tokens, 0.1, arch=80) == "masked"


def test_int8_weights_are_not_expanded_for_few_tokens() -> None:
    assert [choose_path(FfnKind(90, 1, True, LARGE), tokens) for tokens in (1, 16, 17)] == [
        "decode",
        "decode",
        "masked",
    ]


def test_a_newer_architecture_takes_the_rows_of_the_next_older() -> None:
    assert choose(1000, 0.1, arch=100) == "grouped"


def test_an_ffn_takes_the_rows_of_the_nearest_size() -> None:
    small = (BreakEven(tokens=1, decode=0.2), BreakEven(tokens=9))
    table = {**TABLE, FfnKind(90, 2, True, LARGE // 100): small}
    choices = [
        choose_path(FfnKind(90, 2, True, size), 4, 0.1, table)
        for size in (LARGE // 999, LARGE // 11, LARGE // 9, LARGE)
    ]
    assert choices == ["masked", "masked", "decode", "decode"]
    assert choose_path(FfnKind(90, 2, True, LARGE // 99), 1, 0.3, table) == "masked"
    older = {FfnKind(80, 2, True, LARGE): small, **TABLE}
    assert choose_path(FfnKind(90, 2, True, LARGE // 99), 4, 0.1, older) == "decode"


def test_small_ffns_decode_one_token_alone_where_few_experts_are_on() -> None:
    smollm2, llama2 = (FfnKind(90, 2, True, 6 * matrix) for matrix in (576 * 1536, 4096 * 11008))
    assert [choose_path(smollm2, tokens, 0.1) for tokens in (1, 4, 16, 2048)] == [
        "decode",
        "masked",
        "masked",
        "grouped",
    ]
    assert [choose_path(smollm2, 1, fraction) for fraction in (None, 0.5)] == ["decode", "masked"]
    assert [choose_path(llama2, 1, fraction) for fraction in (0.5, 1.0)] == ["decode", "masked"]
    assert [choose_path(llama2, tokens, 0.1) for tokens in (1, 4, 2048)] == ["decode", "decode", "grouped"]


def test_the_measured_table_is_in_order() -> None:
    for rows in MEASURED.values():
        assert [row.tokens for row in rows] == sorted({row.tokens for row in rows})
        for row in rows:
            assert 0 <= row.decode <= 1
            assert 0 <= row.grouped <= 1


def test_the_break_even_lies_between_two_measurements() -> None:
    assert break_even({0.1: 0.6, 0.2: 0.8, 0.5: 1.4, 1.0: 2.0}) == 0.3
    assert break_even({0.1: 0.6, 0.2: 0.8, 0.5: 1.4, 1.0: 2.0}, limit=0.9) == 0.25
    assert break_even({0.1: 1.1, 0.5: 0.9}) == 0
    assert break_even({0.2: 0.5, 1.0: 1.0}) == 1
    assert break_even({0.2: 0.5, 0.5: 0.9}) == 0.5
    assert break_even({}) == 0


def test_between_two_measurements_the_lower_limits_hold() -> None:
    points = [BreakEven(tokens=8, decode=0.5), BreakEven(tokens=1, decode=1.0), BreakEven(tokens=64, grouped=0.3)]
    assert propose_rows(points) == (
        BreakEven(tokens=1, decode=1.0),
        BreakEven(tokens=8, decode=0.5),
        BreakEven(tokens=63),
        BreakEven(tokens=64, grouped=0.3),
    )
    with pytest.raises(ValueError, match="points must hold at least one measurement"):
        propose_rows([])


def test_the_choice_in_words() -> None:
    text = explain_path(FfnKind(90, 2, True, LARGE), 4, 0.2, TABLE)
    assert text.startswith("4 tokens (sm_90, 2 bytes per weight, gated, 200 MB of weights): decode: one kernel reads")
    assert "20% of the experts active per token, 59% for any of 4" in text
    assert "decode wins up to 60% of the experts needed by any token, grouped never wins (measured on sm_90" in text
    assert "sm_90 with 200 MB of weights)" in text
    assert "1 token (" in explain_path(FfnKind(80, 2, True, LARGE), 1, None, TABLE)
    assert "no measurement for this kind" in explain_path(FfnKind(80, 2, True, LARGE), 1, None, TABLE)
    assert "unknown and counts as 100%" in explain_path(FfnKind(90, 2, True, LARGE), 500, None, TABLE)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="tokens must be at least 1, got tokens=0"):
        choose_path(FfnKind(90, 2, True, LARGE), 0)
    with pytest.raises(ValueError, match=r"active_fraction must lie in \[0, 1\], got active_fraction=1.5"):
        choose_path(FfnKind(90, 2, True, LARGE), 1, 1.5)
