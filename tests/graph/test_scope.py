"""The context in scope belongs to a thread and a task, and nothing of it stays behind."""

import asyncio
import contextvars
import copy
import gc
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from torch import nn

import normswap
from normswap.errors import ContextError, MissingContextError
from normswap.graph import scope as scope_module
from tests.support.behave import LABELS, Block, Both, Holder, Own, images, separate


def make(model=None):
    torch.manual_seed(0)
    converted = normswap.convert((model or Own()).eval(), "cn", contexts=3, verify=False)
    separate(converted)
    return converted


def run(model, **given):
    with torch.no_grad():
        return model(images(), **given)


@pytest.fixture(params=[Own, Both], ids=["scoped", "threaded"])
def model(request):
    return make(request.param())


@pytest.fixture
def pool():
    with ThreadPoolExecutor(1) as pool:
        yield pool


def in_thread(function, *args):
    """Return what a new thread returns, while this one waits."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def test_overlapping_tasks_each_see_their_own_labels(model):
    expected = [run(model, context=k) for k in range(2)]
    found = {}

    async def task(k, mine, other):
        with normswap.use_context(model, k):
            mine.set()
            await other.wait()
            found[k] = run(model)

    async def main():
        found["before"] = run(model)
        first, second, done = asyncio.Event(), asyncio.Event(), asyncio.Event()
        slow = asyncio.create_task(task(0, first, done))
        await first.wait()
        found["beside"] = run(model)
        await task(1, second, second)
        done.set()
        await slow
        found["after"] = run(model)

    asyncio.run(main())
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    for when in ("beside", "after"):
        assert torch.equal(found[when], found["before"])


def test_a_task_made_inside_a_block_keeps_its_labels(model):
    async def main():
        with normswap.use_context(model, 1):
            task = asyncio.create_task(asyncio.to_thread(run, model))
        return await task

    assert torch.equal(asyncio.run(main()), run(model, context=1))


def test_overlapping_threads_each_see_their_own_labels(model):
    expected = [run(model, context=k) for k in range(3)]
    barrier = threading.Barrier(3)

    def work(k):
        barrier.wait()
        outputs = []
        for _ in range(20):
            with normswap.use_context(model, k):
                outputs.append(run(model))
        return all(torch.equal(y, expected[k]) for y in outputs)

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(3)))
    assert torch.equal(run(model), run(model, context=[None] * 4))


class Paused(nn.Module):
    """Waits in the middle of its forward when it is told to."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Block(), Block()

    def forward(self, x, pause=None):
        try:
            y = self.a(x)
        except ZeroDivisionError:
            y = x
        if pause is not None:
            pause()
        return self.b(y)


def test_a_call_without_labels_beside_a_labelled_one(pool):
    model = make(Paused())
    unlabelled, found = run(model), []

    def beside():
        found.append(pool.submit(run, model).result())

    labelled = run(model, context=LABELS, pause=beside)
    assert torch.equal(found[0], unlabelled)
    assert torch.equal(labelled, run(model, context=LABELS))


def test_calls_beside_each_other_in_a_model_with_every_kind_of_container():
    torch.manual_seed(0)
    model = timm.create_model("efficientvit_b0", num_classes=3).eval()
    model = normswap.convert(model, "cn", contexts=3, verify=False)
    separate(model)
    x = torch.randn(1, 3, 64, 64)

    def call(context):
        with torch.no_grad():
            return model(x, context=context)

    kinds = [None, 0, 1, None, 2, 0]
    expected = [call(k) for k in kinds]
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda i: (i % 6, call(kinds[i % 6])), range(30)):
            torch.testing.assert_close(found[1], expected[found[0]])


def test_part_of_a_model_in_a_thread_of_its_forward_is_an_error(pool):
    model = make(Paused())
    part = model.b.norm

    def beside():
        pool.submit(part, images()).result()

    with pytest.raises(ContextError, match="copy_context"):
        run(model, context=LABELS, pause=beside)
    run(model, pause=beside)


def test_a_thread_of_a_forward_that_takes_the_context_along(pool):
    class Along(Holder):
        def forward(self, x, call=None):
            y = self.a(x)
            return self.b(y) if call is None else call(y)

    model = make(Along())
    found = run(
        model,
        context=LABELS,
        call=lambda y: pool.submit(contextvars.copy_context().run, model.b, y).result(),
    )
    torch.testing.assert_close(found, run(model, context=LABELS))


def test_a_block_around_another_thread_is_an_error_that_names_the_ways_out(model, pool):
    with normswap.use_context(model, 1):
        with pytest.raises(ContextError, match=r"use_context\(model, None\)"):
            in_thread(run, model)
        own = pool.submit(lambda: run(model, context=2)).result()
        along = pool.submit(contextvars.copy_context().run, run, model).result()

        def without():
            with normswap.use_context(model, None):
                return run(model)

        none = pool.submit(without).result()
    assert torch.equal(own, run(model, context=2))
    assert torch.equal(along, run(model, context=1))
    assert torch.equal(none, run(model))
    assert torch.equal(in_thread(run, model), run(model))


def test_an_executor_that_takes_nothing_along_is_an_error(model):
    async def main():
        with normswap.use_context(model, 1):
            return await asyncio.get_running_loop().run_in_executor(None, run, model)

    with pytest.raises(ContextError, match="another thread"):
        asyncio.run(main())


def test_replicas_in_threads_take_the_labels_they_are_passed(model):
    x, expected = images(), run(model, context=LABELS)
    halves = [slice(0, 2), slice(2, 4)]
    replicas = [model._replicate_for_data_parallel() for _ in halves]

    def work(i):
        with torch.no_grad():
            return replicas[i](x[halves[i]], context=LABELS[halves[i]])

    with ThreadPoolExecutor(2) as pool:
        torch.testing.assert_close(torch.cat(list(pool.map(work, range(2)))), expected)


def test_none_hides_an_outer_block(model):
    unlabelled = run(model)
    with normswap.use_context(model, 1):
        with normswap.use_context(model, None):
            assert torch.equal(run(model), unlabelled)
            with pytest.raises(MissingContextError):
                model.train()(images())
            model.eval()
            with normswap.use_context(model, 2):
                assert torch.equal(run(model), run(model, context=2))
        assert torch.equal(run(model), run(model, context=1))


def test_an_exception_leaves_nothing_in_scope(model):
    unlabelled = run(model)
    with pytest.raises(ValueError, match="stop"), normswap.use_context(model, 1):
        raise ValueError("stop")
    assert torch.equal(run(model), unlabelled)

    def fail(*_):
        raise ValueError("inside")

    handle = model.b.conv.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="inside"), normswap.use_context(model, 1):
        run(model)
    with pytest.raises(ValueError, match="inside"):
        run(model, context=LABELS)
    handle.remove()
    assert torch.equal(run(model), unlabelled)
    assert torch.equal(in_thread(run, model), unlabelled)


def test_a_block_inside_a_forward_counts_there_alone():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.inner = Block(), Block(), None

        def forward(self, x):
            try:
                y = self.a(x)
            except ZeroDivisionError:
                y = x
            with normswap.use_context(self, 2):
                y = self.b(y)
            return self.a(y)

    model = make(Outer())
    a, b, x = model.a, model.b, images()
    with torch.no_grad():
        expected = a(b(a(x, context=LABELS), context=2), context=LABELS)
    torch.testing.assert_close(run(model, context=LABELS), expected)


def test_copies_and_pickles_made_inside_a_block_start_without_labels(model):
    unlabelled = run(model)
    with normswap.use_context(model, 1):
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(run(other), unlabelled)
            with normswap.use_context(other, 2):
                assert torch.equal(run(other), run(other, context=2))
                assert torch.equal(run(model), run(model, context=1))


def test_a_copy_called_inside_a_forward_has_no_part_in_its_labels():
    model = make(Paused())
    unlabelled, found = run(model), []
    twin = copy.deepcopy(model)
    run(model, context=LABELS, pause=lambda: found.append(run(twin)))
    assert torch.equal(found[0], unlabelled)


def test_a_pickled_copy_of_a_part_still_belongs_to_its_model():
    model = make(Own())
    expected = run(model, context=LABELS)
    model.a = nn.Sequential(copy.deepcopy(model.a))
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(other, context=LABELS), expected)
        with normswap.use_context(other, LABELS):
            assert torch.equal(run(other), expected)


def test_models_beside_each_other_in_a_module_keep_their_labels_apart():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = make(Own()), make(Both())

        def forward(self, x):
            return self.one(x, context=1), self.two(x)

    pair = Pair()
    one, two = run(pair)
    assert torch.equal(one, run(pair.one, context=1))
    assert torch.equal(two, run(pair.two))
    with normswap.use_context(pair, 2):
        one, two = run(pair)
    assert torch.equal(one, run(pair.one, context=1))
    assert torch.equal(two, run(pair.two, context=2))


def test_what_a_forward_yields_is_computed_in_scope():
    class Lazy(Holder):
        def forward(self, x):
            yield self.a(x)
            yield self.b(x)

    class Mapped(Holder):
        def forward(self, x):
            return map(lambda block: block(x), [self.a, self.b])

    for kind in (Lazy, Mapped):
        model = make(kind())
        expected = [block(images(), context=LABELS) for block in (model.a, model.b)]
        lazy = model(images(), context=LABELS)
        unlabelled = list(model(images()))
        for one, other, none in zip(lazy, expected, unlabelled, strict=True):
            torch.testing.assert_close(one, other)
            assert not torch.equal(one, none)


def test_a_model_that_was_used_is_freed():
    model = make(Own())
    scope = weakref.ref(model.a.norm.scope)
    with normswap.use_context(model, 1):
        run(model)
    del model
    gc.collect()
    assert scope() is None


@pytest.mark.parametrize("reads", [True, False], ids=["contextvars", "mirror"])
def test_compiled_code_sees_the_block_of_its_thread(model, monkeypatch, reads):
    monkeypatch.setattr(scope_module, "_COMPILES_CONTEXTVARS", reads)
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


@pytest.mark.parametrize("reads", [True, False], ids=["contextvars", "mirror"])
def test_compiled_code_in_overlapping_tasks(model, monkeypatch, reads):
    monkeypatch.setattr(scope_module, "_COMPILES_CONTEXTVARS", reads)
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
