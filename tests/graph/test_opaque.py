"""Containers that keep their own forward: nested, failing, checkpointed, in threads."""

import threading

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import ConversionError
from tests.support.behave import CHANNELS, LABELS, Block, Holder, call, check, images, separate


class Opaque(Holder):
    def forward(self, x, fail=False):
        try:
            y = self.b(self.a(x))
        except ZeroDivisionError:
            y = x
        if fail:
            raise ValueError("in the middle")
        return self.b(y)


class Nested(nn.Module):
    """Opaque, around threaded, around opaque."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(Opaque(), nn.BatchNorm2d(CHANNELS))
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x):
        try:
            return self.norm(self.inner(x))
        except ZeroDivisionError:
            return x


def test_nested_in_threaded_nested_in_opaque():
    report = normswap.summary(check(Nested(), opaque="handles exceptions"))
    found = {row.fqn: row.delivery for row in report.rows}
    assert found.pop("norm") == "scoped"  # the only one that an opaque forward calls itself
    assert len(found) == 3
    assert set(found.values()) == {"threaded"}


def test_nothing_stays_in_scope_after_an_exception():
    converted = check(Opaque(), opaque="handles exceptions")
    unknown = call(converted, (images(),))
    with pytest.raises(ValueError, match="in the middle"):
        call(converted, (images(), True), context=LABELS)
    assert torch.equal(call(converted, (images(),))[0], unknown[0])


def test_nothing_stays_in_scope_after_a_call():
    converted = check(Opaque(), opaque="handles exceptions")
    unknown = call(converted, (images(),))
    call(converted, (images(),), context=LABELS)
    assert torch.equal(call(converted, (images(),))[0], unknown[0])


def test_threads_keep_their_contexts_apart():
    converted = check(Nested(), opaque="handles exceptions")
    expected = [call(converted, (images(),), context=torch.full((4,), k))[0] for k in range(3)]
    wrong = []

    def run(k):
        for _ in range(40):
            (output,) = call(converted, (images(),), context=torch.full((4,), k))
            if not torch.allclose(output, expected[k], atol=1e-5):
                wrong.append(k)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_outside_of_a_trace(reentrant):
    class Model(Holder):
        def __init__(self, on):
            super().__init__()
            self.on = on

        def forward(self, x):
            try:
                y = self.a(x)
            except ZeroDivisionError:
                y = x
            if not self.on:
                return self.b(y)
            return torch.utils.checkpoint.checkpoint(self.b, y, use_reentrant=reentrant)

    gradients = []
    for on in (False, True):
        torch.manual_seed(0)
        converted = normswap.convert(Model(on).eval(), "cn", contexts=3, verify=False)
        separate(converted)
        converted(images().requires_grad_(), context=LABELS).pow(2).sum().backward()
        gradients.append([p.grad for p in converted.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_an_opaque_model_compiles():
    class Model(Holder):
        def forward(self, x):
            try:
                return self.b(self.a(x))
            except ZeroDivisionError:
                return x

    converted = check(Model(), opaque="handles exceptions")
    compiled = torch.compile(converted, backend="eager", fullgraph=True)
    expected = call(converted, (images(),), context=LABELS)
    torch.testing.assert_close(call(compiled, (images(),), context=LABELS), expected)


def test_a_block_of_use_context_reaches_opaque_containers():
    converted = check(Nested(), opaque="handles exceptions")
    with normswap.use_context(converted, LABELS):
        inside = call(converted, (images(),))
    torch.testing.assert_close(inside, call(converted, (images(),), context=LABELS))


def test_labels_of_a_block_stay_out_of_a_call_that_has_its_own():
    model = nn.Sequential(Block())
    converted = check(model)
    with normswap.use_context(converted, LABELS):
        own = call(converted, (images(),), context=LABELS.flip(0))
    torch.testing.assert_close(own, call(converted, (images(),), context=LABELS.flip(0)))


class Awaited(Holder):
    async def forward(self, x):
        return self.b(self.a(x))


class Streamed(Holder):
    async def forward(self, x):
        yield self.b(self.a(x))


class Lazy(Holder):
    def forward(self, x):
        yield self.a(x)
        yield self.b(x)


class Mapped(Holder):
    def forward(self, x):
        return map(lambda block: block(x), [self.a, self.b])


@pytest.mark.parametrize("kind", [Awaited, Streamed, Lazy, Mapped])
def test_a_forward_that_runs_when_the_labels_are_gone_is_refused(kind):
    model = normswap.convert(kind().eval(), "cn", contexts=3, verify=False)
    with pytest.raises(ConversionError, match=r"the forward of the model .* without async"):
        model(images(), context=LABELS)
