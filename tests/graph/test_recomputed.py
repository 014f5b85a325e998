"""What checkpointing computes again in backward has the context of its own forward."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import normswap
from tests.support.behave import LABELS, Block, Both, Holder, Own, images
from tests.support.recomputed import REENTRANT, TRAINING, Inside, again, make, plainly


def gradients(model, call, contexts=None):
    """Return gradients of one backward through several forwards, and what state is left."""
    model, total, x = copy.deepcopy(model), 0, images().requires_grad_()
    for k, context in enumerate(contexts or contexts_of(training=False)):
        total = total + (call(model, x, context) * (k + 1)).sin().sum()
    total.backward()
    return [x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def contexts_of(training):
    labelled = (LABELS, LABELS.flip(0), torch.tensor([0, 0, 1, 1]))
    return labelled if training else (*labelled[:2], None)


@REENTRANT
@TRAINING
@pytest.mark.parametrize("kind", [Both, Own])
def test_forwards_in_blocks_then_one_backward(kind, training, reentrant):
    def call(wrap):
        def run(model, x, context):
            with normswap.use_context(model, context):
                return wrap(model, x)

        return run

    model, contexts = make(kind(), training), contexts_of(training)
    expected = gradients(model, call(plainly), contexts)
    assert_same(gradients(model, call(again(reentrant)), contexts), expected)


@REENTRANT
@TRAINING
def test_checkpointing_inside_a_container_that_keeps_its_forward(training, reentrant):
    def call(model, x, context):
        return model(x, context=context)

    plain = make(Inside(plainly), training)
    checked = copy.deepcopy(plain)
    checked.wrap = again(reentrant)
    contexts = contexts_of(training)
    assert_same(gradients(checked, call, contexts), gradients(plain, call, contexts))


@REENTRANT
def test_backward_inside_another_block_or_forward(reentrant):
    model = make(Own())

    def backward_in(context):
        x = images().requires_grad_()
        with normswap.use_context(model, LABELS):
            y = checkpoint(model, x, use_reentrant=reentrant)
        if context is None:
            y.sum().backward()
        else:
            with normswap.use_context(model, context):
                model(x)
                y.sum().backward()
        return x.grad

    assert torch.equal(backward_in(LABELS.flip(0)), backward_in(None))
    x = images().requires_grad_()
    model(x, context=LABELS).sum().backward()
    torch.testing.assert_close(backward_in(2), x.grad)


def test_a_backward_inside_a_forward():
    """As a gradient penalty does, of a part that was computed with other labels."""

    class Penalty(Holder):
        def forward(self, x, y=None):
            try:
                z = self.b(self.a(x))
            except ZeroDivisionError:
                z = x
            return z if y is None else z + torch.autograd.grad(y.sum(), self.given)[0]

    model = make(Penalty())
    outputs = []
    for wrap in (plainly, again(False)):
        model.given = images().requires_grad_()
        with normswap.use_context(model, 1):
            y = wrap(model, model.given)
        outputs.append(model(images(), y, context=LABELS))
    torch.testing.assert_close(outputs[1], outputs[0])


@REENTRANT
def test_nested_checkpointing(reentrant):
    def nested(function, x):
        inner = lambda y: checkpoint(function, y, use_reentrant=False)  # noqa: E731
        return checkpoint(inner, x, use_reentrant=reentrant)

    def call(model, x, context):
        return model(x, context=context)

    plain = make(Inside(plainly))
    checked = copy.deepcopy(plain)
    checked.wrap = nested
    assert_same(gradients(checked, call), gradients(plain, call))


def test_other_saved_tensor_hooks_inside_and_outside():
    def hooked(function, x):
        def inner(y):
            with torch.autograd.graph.save_on_cpu():
                return function(y)

        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return checkpoint(inner, x, use_reentrant=False)

    def call(model, x, context):
        return model(x, context=context)

    plain = make(Inside(plainly))
    checked = copy.deepcopy(plain)
    checked.wrap = hooked
    assert_same(gradients(checked, call), gradients(plain, call))


def test_backward_twice_and_in_another_thread():
    import threading

    model = make(Own())
    found = []
    for wrap in (plainly, again(False)):
        x = images().requires_grad_()
        with normswap.use_context(model, LABELS):
            y = wrap(model, x)
        y.sum().backward(retain_graph=True)
        thread = threading.Thread(target=lambda y=y: y.sum().backward())
        thread.start()
        thread.join()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0])


def test_sequential_checkpointing():
    model = make(nn.Sequential(Block(), Own(), Block()))

    def call(model, x, context, wrap=True):
        with normswap.use_context(model, context):
            if wrap:
                return checkpoint_sequential(model, 2, x, use_reentrant=False)
            return model(x)

    expected = gradients(model, lambda *given: call(*given, wrap=False))
    assert_same(gradients(model, call), expected)


class Reversible(torch.autograd.Function):
    """Computes its function again in backward, as reversible blocks and other libraries do."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function, ctx.x = function, x.detach()
        return function(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.x.requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        torch.autograd.backward(y, gradient)
        return None, x.grad


def test_autograd_functions_that_compute_their_forward_again():
    def call(model, x, context):
        return model(x, context=context)

    plain = make(Inside(plainly))
    checked = copy.deepcopy(plain)
    checked.wrap = Reversible.apply
    assert_same(gradients(checked, call), gradients(plain, call))


def test_composable_checkpointing():
    from torch.distributed._composable import checkpoint as compose

    def call(model, x, context):
        return model(x, context=context)

    plain = make(Own())
    checked = copy.deepcopy(plain)
    for model in (checked,):
        compose(model.b)
    x, other = images().requires_grad_(), images().requires_grad_()
    for model, given in ((plain, x), (checked, other)):
        y = model(given, context=LABELS) + model(given, context=LABELS.flip(0)).sin()
        y.sum().backward()
    torch.testing.assert_close(other.grad, x.grad)


@pytest.mark.gpu
@REENTRANT
def test_backward_runs_in_a_thread_of_the_device(reentrant):
    model = make(Inside(plainly)).cuda()
    grads = []
    for wrap in (plainly, again(reentrant)):
        model.wrap = wrap
        x = images().cuda().requires_grad_()
        y = model(x, context=LABELS.cuda())
        with normswap.use_context(model, 2):
            y = y + wrap(model, x).sin()
        y.sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0])
