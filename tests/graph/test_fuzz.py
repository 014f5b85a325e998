"""Forwards put together at random: right, or refused with a way out; see `tests/graph/fuzz`."""

from pathlib import Path

import pytest

from tests.graph.fuzz.alone import alone
from tests.graph.fuzz.campaign import campaign, fails_alike, generate, safely
from tests.graph.fuzz.constructs import CONSTRUCTS
from tests.graph.fuzz.program import parse
from tests.graph.fuzz.shrink import shrink
from tests.graph.fuzz.sides import Converted

PROGRAMS = sorted(Path(__file__).parent.glob("fuzz/programs/*.txt"))
# A run meets every construct: in one of the random programs, or else alone.
PROGRAM_COUNT = 200


def _expect_none(verdict):
    assert not verdict.failures, verdict.detail
    assert not verdict.invalid


def test_a_construct_that_no_random_program_draws_alone():
    drawn = {name for number in range(PROGRAM_COUNT) for name in generate(number).names}
    for name in [name for name in CONSTRUCTS if name not in drawn]:
        _expect_none(safely(alone(CONSTRUCTS[name])))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CONSTRUCTS)
def test_a_construct_alone(name):
    _expect_none(safely(alone(CONSTRUCTS[name])))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_constructs_together(path):
    _expect_none(safely(parse(path.read_text())))


def test_the_judge_sees_contexts_that_are_swapped(monkeypatch):
    take = Converted.take
    monkeypatch.setattr(Converted, "take", lambda self, rows: take(self, rows[::-1]))
    kinds = [failure.kind for failure in safely(alone(CONSTRUCTS["call"])).failures]
    assert len(kinds) == 2
    assert all("eval: another value" in kind for kind in kinds)


@pytest.mark.parametrize("start", range(0, PROGRAM_COUNT, 10))
def test_random_programs(start):
    tally = campaign(range(start, start + 10))
    for kind, found in tally.failures.items():
        small = shrink(found[0], fails_alike(kind), 30)
        pytest.fail(f"{small}\n{safely(small).detail}")
