"""The tests' own tools: a run's sample, the comparison of tensors, and memory that shows what is not written."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest
import sampling
import torch
from compare import same


@pytest.fixture
def seeded(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    sampling.seed.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    sampling.seed.cache_clear()


CASES = [dict(zip("abc", values, strict=True)) for values in itertools.product("uvwxyz", range(50), (True, False))]


@pytest.mark.parametrize("seed", ["1", "2", "37"])
def test_a_sample_holds_each_value_and_repeats(seeded: pytest.MonkeyPatch, seed: str) -> None:
    seeded.setenv(sampling.SEED, seed)
    kept = sampling.cases_of(CASES, "test")
    assert kept == sampling.cases_of(CASES, "test") != sampling.cases_of(CASES, "another test")
    assert 50 <= len(kept) < 70
    for key in "abc":
        assert {CASES[at][key] for at in kept} == {case[key] for case in CASES}
    assert len(sampling.cases_of(CASES[: sampling.MOST_CASES], "test")) == sampling.MOST_CASES
    assert sampling.in_turn("abcd", 2) == {"1": ["b", "c"], "2": ["c", "d"], "37": ["b", "c"]}[seed]
    assert 20 < len(list(sampling.drawn(range(600), 0.1, "test"))) < 120


def test_all_is_all(seeded: pytest.MonkeyPatch) -> None:
    seeded.setenv(sampling.SEED, "all")
    assert sampling.cases_of(CASES, "test") == set(range(len(CASES)))
    assert sampling.in_turn("abcd", 2) == list("abcd")
    assert list(sampling.drawn(range(9), 0.1, "test")) == list(range(9))


def test_without_a_seed_it_is_that_of_the_commit(seeded: pytest.MonkeyPatch) -> None:
    seeded.delenv(sampling.SEED, raising=False)
    assert isinstance(sampling.seed(), int)
    assert str(sampling.seed()) in sampling.described()


def test_same_sees_each_difference() -> None:
    x = torch.tensor([[1.0, torch.nan], [-0.0, 2.0]])
    same(x, x.clone())
    same([x, (x, x)], (x, [x, x]))
    same(x, x + 0.0)  # which makes -0.0 a zero
    others = [x.double(), x[:1], x.t(), x.nan_to_num(), torch.tensor([[1.0, torch.nan], [0.0, 2.0000002]])]
    for other in [*others, [x]]:
        with pytest.raises(AssertionError):
            same([x, x] if isinstance(other, list) else x, other)
    with pytest.raises(AssertionError, match="1 zeros or NaNs differ in sign"):
        same(x, x + 0.0, exact=True)


@pytest.mark.skipif("perturb" not in os.environ.get("GLIBC_TUNABLES", ""), reason="set by `make pytest`")
@pytest.mark.parametrize("size", [1, 100, 1 << 12, 1 << 22])
def test_memory_that_is_not_written_shows(size: int) -> None:
    for _ in range(3):  # what was freed is filled again
        x = torch.empty(size)
        assert (x < -1e38).all()
        assert torch.empty(size, dtype=torch.float16).isnan().all()
        assert (torch.empty(size, dtype=torch.int8) == -2).all()
        x.fill_(1.0)
