"""The context in scope belongs to a thread and a task."""

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch

import normswap
from normswap.errors import ContextError
from tests.support.behave import LABELS, Holder, images, separate
from tests.support.scoped import Paused, in_thread, make, run


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
