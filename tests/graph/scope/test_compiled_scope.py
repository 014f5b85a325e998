"""Compiled code sees the context of its own thread and task."""

import asyncio

import pytest
import torch

import normswap
from normswap.graph.scope import scope as scope_module
from tests.support.behave import LABELS, Both, Holder, Own, images
from tests.support.sampling import sampled
from tests.support.scoped import in_thread, make, run

# A model that keeps its own forward, or not; by contextvars, or by what mirrors them.
READS = pytest.mark.parametrize(
    ("model", "reads"),
    sampled([(Own, True), (Both, False), (Own, False), (Both, True)], 2),
    indirect=True,
)


@pytest.fixture
def reads(request, monkeypatch):
    if request.param and not scope_module._COMPILES_CONTEXTVARS:
        pytest.skip("torch 2.14 is the first to compile contextvars")
    monkeypatch.setattr(scope_module, "_COMPILES_CONTEXTVARS", request.param)
    return request.param


@READS
@pytest.mark.usefixtures("reads")
def test_compiled_code_sees_the_block_of_its_thread(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    unlabelled = run(model)
    for _ in range(2):
        for k in range(2):
            with normswap.use_context(compiled, k):
                torch.testing.assert_close(run(compiled), run(model, context=k))

                def other(k=k):
                    with normswap.use_context(model, 2):
                        return run(compiled)

                torch.testing.assert_close(in_thread(other), run(model, context=2))
                with normswap.use_context(model, None):
                    torch.testing.assert_close(run(compiled), unlabelled)
                torch.testing.assert_close(run(compiled), run(model, context=k))
        torch.testing.assert_close(run(compiled), unlabelled)


@READS
def test_compiled_code_in_overlapping_tasks(model, reads):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = []

    async def task(k, started, go):
        with normswap.use_context(model, k):
            started.set()
            await go.wait()
            found.append((k, run(compiled)))

    async def main():
        first, done = asyncio.Event(), asyncio.Event()
        slow = asyncio.create_task(task(0, first, done))
        await first.wait()
        await task(1, done, done)
        await slow

    if not reads:
        with pytest.raises(Exception, match="one asyncio task at a time"):
            asyncio.run(main())
    else:
        asyncio.run(main())
        assert len(found) == 2
    for k, output in found:
        torch.testing.assert_close(output, run(model, context=k))
    torch.testing.assert_close(run(compiled), run(model))


def test_compiled_code_in_a_thread_of_a_block_is_an_error(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with normswap.use_context(model, 1), pytest.raises(Exception, match="in another thread"):
        in_thread(run, compiled)
    torch.testing.assert_close(in_thread(run, compiled), run(model))


def test_a_compiled_forward_with_a_graph_break_is_of_its_thread():
    class Broken(Holder):
        def forward(self, x):
            try:
                y = self.a(x)
            except ZeroDivisionError:
                y = x
            torch._dynamo.graph_break()
            return self.b(y)

    model = make(Broken())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    expected = [run(model, context=k) for k in range(3)]
    for _ in range(2):
        for k in range(3):
            torch.testing.assert_close(run(compiled, context=k), expected[k])
    torch.testing.assert_close(run(compiled), run(model))


def test_a_block_opened_in_compiled_code():
    model, other = make(Both()), make(Own())
    torch._dynamo.reset()

    @torch.compile(backend="eager", fullgraph=True)
    def both(x, labels):
        with normswap.use_context(model, labels), normswap.use_context(other, labels.flip(0)):
            return model(x), other(x)

    one, two = both(images(), LABELS)
    torch.testing.assert_close(one, model(images(), context=LABELS))
    torch.testing.assert_close(two, other(images(), context=LABELS.flip(0)))
    torch.testing.assert_close(run(model), make(Both())(images()))
