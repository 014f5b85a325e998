"""Forwards put together at random: right, or refused with a way out; see `tests/graph/fuzz`."""

import pytest

from tests.graph.fuzz.alone import alone
from tests.graph.fuzz.campaign import campaign, fails_alike, safely
from tests.graph.fuzz.constructs import CONSTRUCTS
from tests.graph.fuzz.known import CONSTRUCTS_KNOWN, KNOWN, PROGRAMS, covering
from tests.graph.fuzz.program import parse
from tests.graph.fuzz.shrink import shrink
from tests.graph.fuzz.world import Converted

NAMES = sorted(path.stem for path in PROGRAMS.glob("*.txt"))


def _marked(name, reason):
    marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
    return pytest.param(name, marks=marks)


def _expect_none(verdict):
    assert not verdict.failures, verdict.detail
    assert not verdict.invalid


@pytest.mark.parametrize("name", [_marked(n, CONSTRUCTS_KNOWN.get(n)) for n in CONSTRUCTS])
def test_a_construct_alone(name):
    _expect_none(safely(alone(CONSTRUCTS[name])))


@pytest.mark.parametrize("name", [_marked(n, n in KNOWN and KNOWN[n].reason) for n in NAMES])
def test_constructs_together(name):
    _expect_none(safely(parse((PROGRAMS / f"{name}.txt").read_text())))


def test_the_judge_sees_contexts_that_are_swapped(monkeypatch):
    take = Converted.take
    monkeypatch.setattr(Converted, "take", lambda self, rows: take(self, rows[::-1]))
    kinds = [failure.kind for failure in safely(alone(CONSTRUCTS["call"])).failures]
    assert len(kinds) == 2
    assert all("eval: another value" in kind for kind in kinds)


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known_to_fail_fails_as_it_is_known_to(name):
    text = (PROGRAMS / f"{name}.txt").read_text()
    verdict = safely(parse(text))
    assert any(covering(text, failure.kind) for failure in verdict.failures), verdict.detail


@pytest.mark.parametrize("start", range(0, 200, 20))
def test_random_programs(start):
    tally = campaign(range(start, start + 20))
    for kind, found in tally.failures.items():
        small = shrink(found[0], fails_alike(kind), 30)
        pytest.fail(f"{small}\n{safely(small).detail}")
