"""Blocks of `use_context` nest, and nothing of them stays behind."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import ContextError, MissingContextError
from tests.support.behave import LABELS, Block, Both, Own, images
from tests.support.scoped import Paused, in_thread, make, run


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


def test_a_model_that_was_used_is_freed():
    model = make(Own())
    scope = weakref.ref(model.a.norm.scope)
    with normswap.use_context(model, 1):
        run(model)
    del model
    gc.collect()
    assert scope() is None


def test_loaders_that_take_turns_with_a_block_each_are_an_error(model):
    def labelled(label):
        for _ in range(2):
            with normswap.use_context(model, label):
                yield images()

    unlabelled, loaders = run(model), zip(labelled(0), labelled(2), strict=True)
    next(loaders)
    assert torch.equal(run(model), run(model, context=2))
    with pytest.raises(ContextError, match="end innermost first"):
        next(loaders)
    del loaders
    assert torch.equal(run(model), unlabelled)


def test_blocks_given_up_in_any_order_leave_the_labels_of_those_that_stay(model):
    unlabelled, blocks = run(model), [normswap.use_context(model, k) for k in range(3)]
    for block in blocks:
        block.__enter__()
    for last, rest in ((1, 2), (2, 0)):
        blocks[last].gen.close()
        assert torch.equal(run(model), run(model, context=rest))
    blocks[0].gen.close()
    assert torch.equal(run(model), unlabelled)


def test_a_block_that_ends_in_another_thread_is_an_error(model, pool):
    block = normswap.use_context(model, 2)
    block.__enter__()
    with pytest.raises(ContextError, match="in the thread and asyncio task that it began in"):
        pool.submit(block.gen.close).result()
    assert torch.equal(run(model), run(model, context=2))


def test_a_part_of_another_model_does_not_lose_the_labels_of_a_forward(model):
    other = copy.deepcopy(model)
    other.b = model.b
    expected = run(model, context=LABELS)
    with pytest.raises(ContextError, match="a part of one converted model"):
        run(other, context=LABELS)
    with normswap.use_context(nn.ModuleList([model, other]), LABELS):
        assert torch.equal(run(other), expected)
    with normswap.use_context(model.b, None), torch.no_grad():
        unlabelled = model.b(model.a(images(), context=LABELS))
        assert torch.equal(run(other, context=LABELS), unlabelled)
