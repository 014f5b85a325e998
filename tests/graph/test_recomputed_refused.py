"""What backward computes again is an error where its context cannot be told."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import normswap
from normswap.errors import ContextError
from tests.support.behave import LABELS, Holder, Own, images
from tests.support.recomputed import REENTRANT, Inside, again, make, plainly
from tests.support.sampling import sampled


def test_a_part_under_two_contexts_is_an_error():
    model = make(Own())

    def both(x):
        with normswap.use_context(model, 1):
            y = model(x)
        return model(y)

    with normswap.use_context(model, LABELS):
        y = checkpoint(both, images().requires_grad_(), use_reentrant=False)
    with pytest.raises(ContextError, match="several to choose from"):
        y.sum().backward()


@REENTRANT
def test_labels_written_over_before_backward_are_an_error(reentrant):
    model, labels = make(Own()), LABELS.clone()
    with normswap.use_context(model, labels):
        y = again(reentrant)(model, images().requires_grad_())
    labels.zero_()
    with pytest.raises(ContextError, match=r"written to since; pass a copy"):
        y.sum().backward()


def test_labels_passed_inside_the_part_need_nothing():
    model = make(Own())

    def twice(x):
        y = model(x, context=LABELS)
        with normswap.use_context(model, 1):
            return model(y)

    grads = []
    for wrap in (plainly, again(False)):
        x = images().requires_grad_()
        wrap(twice, x).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0])


def test_a_forward_run_by_backward_that_was_none_before():
    model, seen = make(Own()), []
    y = model(images().requires_grad_(), context=LABELS)
    y.register_hook(lambda _: seen.append(model(images())))
    with pytest.raises(ContextError, match="to choose from"):
        y.sum().backward()

    def hook(_):
        with normswap.use_context(model, None):
            seen.append(model(images()))

    y = model(images().requires_grad_(), context=LABELS)
    y.register_hook(hook)
    y.sum().backward()
    assert torch.equal(seen[0], model(images()))


# Each pair of values in every run, each three of them in exhaustive ones.
EACH = list(itertools.product((False, True), repeat=3))
PAIRS = [each for each in EACH if sum(each) % 2]


@pytest.mark.parametrize(
    ("reentrant", "training", "trace"), sampled(sorted(EACH, key=PAIRS.count, reverse=True), 4)
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch.compile warns of what it cannot take
def test_a_checkpointed_part_that_is_compiled_by_itself_loses_no_labels(reentrant, training, trace):
    """Compiled code cannot tell that backward runs it."""

    class Part(Holder):
        def forward(self, x):
            self.last = self.a(x)
            return checkpoint(self.b, self.last, use_reentrant=reentrant)

    torch._dynamo.reset()
    model = normswap.convert(Part().eval(), "cn", contexts=3, trace=trace, verify=False)
    model.train(training).b = torch.compile(model.b, backend="eager")
    loss = model(images().requires_grad_(), context=LABELS).sum()
    with pytest.raises(ContextError, match="compile the whole model instead of that part"):
        loss.backward()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_compiled_part_called_by_itself_after_labels_takes_none():
    torch._dynamo.reset()
    model = make(Inside())
    model(images(), context=LABELS)
    expected = model.b(images())
    torch.testing.assert_close(torch.compile(model.b, backend="eager")(images()), expected)
