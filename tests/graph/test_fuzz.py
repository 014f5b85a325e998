"""Forwards put together at random: right, or refused with a way out; see `tests/graph/fuzz`."""

import pytest

from tests.graph.fuzz.campaign import campaign, fails_alike, safely
from tests.graph.fuzz.known import KNOWN, PROGRAMS
from tests.graph.fuzz.program import parse
from tests.graph.fuzz.shrink import shrink

NAMES = sorted(path.stem for path in PROGRAMS.glob("*.txt"))


def _marked(name):
    known = KNOWN.get(name)
    marks = [pytest.mark.xfail(reason=known.reason, strict=True)] if known else []
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [_marked(name) for name in NAMES])
def test_a_small_program(name):
    verdict = safely(parse((PROGRAMS / f"{name}.txt").read_text()))
    assert verdict.status in ("right", "refused"), verdict.detail


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known_to_fail_fails_as_it_is_known_to(name):
    text = (PROGRAMS / f"{name}.txt").read_text()
    verdict = safely(parse(text))
    assert any(KNOWN[name].covers(text, f.kind) for f in verdict.failures), verdict.detail


@pytest.mark.parametrize("seed", range(5))
def test_random_programs(seed):
    for kind, found in campaign(seed, 40).failures.items():
        small = shrink(found[0], fails_alike(kind), 20)
        pytest.fail(f"{small}\n{safely(small).detail}")
