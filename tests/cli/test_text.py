"""Numbers and tables as people read them."""

from __future__ import annotations

import pytest

from regraft.cli import text


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (12_345_678, "12.3 MB"),
        (3_090_000_000, "3.09 GB"),
        (140_000_000_000, "140 GB"),
        (2e18, "2000 PB"),
    ],
)
def test_sizes_are_decimal_with_three_digits(nbytes: float, shown: str) -> None:
    assert text.size(nbytes) == shown


def test_memory_is_in_the_unit_of_its_option() -> None:
    assert text.memory(512 * 2**20) == "512 MiB"


@pytest.mark.parametrize(
    ("value", "shown"), [(500, "500"), (134_515_008, "135 M"), (7e10, "70.0 B")]
)
def test_parameters_are_counted_in_millions_and_billions(value: float, shown: str) -> None:
    assert text.count(value) == shown


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (0, "0%"),
        (1, "100%"),
        (0.61234, "61.2%"),
        (0.0042, "0.42%"),
        (0.000012, "0.0012%"),
        (None, "-"),
        (float("nan"), "-"),
        (float("inf"), "-"),
    ],
)
def test_shares_are_percentages(share: float | None, shown: str) -> None:
    assert text.percent(share) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0.312, "0.31 s"), (12.44, "12.4 s"), (200, "3 min 20 s")]
)
def test_durations_read_well(value: float, shown: str) -> None:
    assert text.seconds(value) == shown


def test_a_table_aligns_its_columns_and_leaves_no_trailing_space() -> None:
    rows = [("name", "n", ""), ("a", "100", "x"), ("long", "2", "")]
    assert text.table(rows, "lrl", indent=" ") == " name    n\n a     100  x\n long    2"


def test_pairs_without_a_value_are_left_out() -> None:
    assert text.pairs([("a", "1"), ("empty", ""), ("long", "2")]) == "a     1\nlong  2"


def test_ranges_join_neighbours() -> None:
    assert text.ranges([0, 1, 2, 3, 7, 9, 10]) == "0..3,7,9..10"


def test_one_is_singular() -> None:
    assert [text.plural(n, "shard") for n in (0, 1, 2)] == ["0 shards", "1 shard", "2 shards"]
