"""Mixtures: names, proportions, paths."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import DataError, DatasetSpec, RawDataset, parse_specs


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("alpaca", [DatasetSpec("alpaca")]),
        ("alpaca:0.5, mine:2", [DatasetSpec("alpaca", 0.5), DatasetSpec("mine", 2.0)]),
        ("a:3/4", [DatasetSpec("a", 0.75)]),
        ("a:100/-1", [DatasetSpec("a", 1.0, 100)]),
        ("a::x.json", [DatasetSpec("a", path="x.json")]),
        (r"a:1.0:C:\data\x.json", [DatasetSpec("a", path=r"C:\data\x.json")]),
        ("a:1e-1:s3://bucket/x", [DatasetSpec("a", 0.1, path="s3://bucket/x")]),
    ],
)
def test_strings(text, expected):
    assert parse_specs(text) == expected


def test_mapping_pairs_and_instances():
    raw = RawDataset.load("hh-excerpt/test")
    value = {"a": 1, "b": 0.25, "c": "1/4", "d": {"proportion": "7/-1", "path": "x"}, "e": Fraction(1, 2), "f": {}}
    specs = parse_specs(value)
    assert [spec.proportion for spec in specs] == [1.0, 0.25, 0.25, 1.0, 0.5, 1.0]
    assert (specs[3].count, specs[3].path) == (7, "x")
    assert parse_specs(list(value.items())) == specs
    assert parse_specs([(raw, 0.5), "alpaca"]) == [DatasetSpec(raw, 0.5), DatasetSpec("alpaca")]
    assert parse_specs([raw])[0].load() is raw


def test_same_name_with_other_paths_is_allowed():
    assert len(parse_specs("local:1:a.json,local:1:b.json")) == 2


@pytest.mark.parametrize("bad", ["x", "-1", "1/0", "1/-2", "-3/-1", "nan", "inf", "1/2/3", -0.5, True, None, [1]])
def test_bad_proportions_name_data_set_and_value(bad):
    with pytest.raises(DataError, match="dataset 'alpaca': proportion .* is not a number >= 0"):
        parse_specs({"alpaca": bad})


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ("", "no dataset is named"),
        ([], "no dataset is named"),
        (":0.5", "the name before ':' is empty"),
        ("a,a", "'a' is named twice"),
        (5, "must be a string, a mapping or a list"),
        ([("a", 1, 2)], "expected a dataset name and its proportion"),
        ({"a": {"ratio": 1}}, "unknown key 'ratio'; allowed: 'proportion', 'path'"),
    ],
)
def test_bad_mixtures(specs, message):
    with pytest.raises(DataError, match=message):
        parse_specs(specs)


@pytest.mark.parametrize("bad", ["0 of 2", "3 of 2", "1 of 0"])
def test_a_part_that_there_is_not(bad):
    with pytest.raises(DataError, match=f"dataset 'a': part '{bad}' must be one from '1 of "):
        parse_specs(f"a:{bad}")


@given(st.lists(st.integers(0, 60), unique=True), st.integers(1, 7))
def test_parts_divide_the_samples(candidates, parts):
    chosen = [parse_specs(f"a:{k} of {parts}:x.json")[0] for k in range(1, parts + 1)]
    assert all((spec.path, spec.proportion, spec.count) == ("x.json", 1.0, None) for spec in chosen)
    taken = [index for spec in chosen for index in spec.select(np.array(candidates, dtype=np.int64)).tolist()]
    assert sorted(taken) == sorted(candidates)
    assert parse_specs("a")[0].select(np.array(candidates, dtype=np.int64)).tolist() == candidates


@given(st.integers(0, 10**6), st.integers(1, 10**4), st.integers(1, 10**4))
def test_sizes(available, numerator, denominator):
    fraction = parse_specs(f"a:{numerator}/{denominator}")[0].size(available)
    assert abs(fraction - Fraction(numerator, denominator) * available) <= Fraction(1, 2) + Fraction(1, 10**3)
    assert parse_specs(f"a:{numerator}/-1")[0].size(available) == numerator
