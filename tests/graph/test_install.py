"""Where a converted forward is installed, and what else may be done with the modules."""

import copy
import functools
import types

import pytest
import torch
from torch import nn

import normswap
from tests.support.behave import (
    CHANNELS,
    LABELS,
    Block,
    Holder,
    call,
    check,
    close,
    images,
    separate,
)


def _sequential():
    return nn.Sequential(
        nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU(), Block()
    )


def test_a_sequential_root():
    check(_sequential())


def test_a_slice_of_a_converted_sequential_takes_the_context():
    converted = check(_sequential())
    whole = call(converted, (images(),), context=LABELS)
    first, last = converted[:2], converted[2:]
    halves = call(last, call(first, (images(),), context=LABELS), context=LABELS)
    close(halves, whole)
    with normswap.use_context(converted, LABELS):
        close(call(last, call(first, (images(),))), whole)


def test_a_slice_without_norms_is_an_ordinary_one():
    converted = check(_sequential())
    close(call(converted[2:3], (images(),)), [images().relu()])


def test_a_slice_made_inside_a_forward():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = _sequential()

        def forward(self, x):
            y = self.layers[:2](x)
            return y + self.layers[2:](y)

    check(Model(), opaque="not registered")


def test_calling_forward_directly():
    class Model(Holder):
        def forward(self, x):
            return self.a.norm.forward(self.b.forward(x))

    check(Model())


def test_an_inherited_forward():
    class Model(Block):
        def __init__(self):
            super().__init__()
            self.last = nn.BatchNorm2d(CHANNELS)

        def forward(self, x):
            return self.last(super().forward(x))

    check(Model())


def test_a_forward_replaced_on_an_instance():
    model = Holder()

    def forward(self, x, gain=2):
        return self.b(self.a(x)) * gain

    model.forward = types.MethodType(forward, model)
    check(model, opaque="replaced on the instance")


class ByMode(Holder):
    @property
    def forward(self):
        return self.learn if self.training else self.serve

    def learn(self, x):
        return self.b(self.a(x)) * 2

    def serve(self, x):
        return self.b(self.a(x))


class ByKind(Holder):
    @functools.singledispatchmethod
    def forward(self, x):
        raise TypeError("expected a tensor")

    @forward.register
    def _(self, x: torch.Tensor):
        return self.b(self.a(x))


@pytest.mark.parametrize("kind", [ByMode, ByKind])
def test_a_forward_that_is_another_on_the_module_than_on_its_class(kind):
    check(kind(), opaque="")


class Staged(Block):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(CHANNELS, 2)

    def forward_features(self, x):
        return Block.forward(self, x)

    def forward(self, x):
        return self.head(self.forward_features(x).mean((2, 3)))


SET = {
    "a method": lambda m: m.forward_features,
    "a function": lambda m: lambda x: m.forward_features(x),
    "any arguments": lambda m: lambda *args, **kwargs: m.forward_features(*args, **kwargs),
    "around it": lambda m: lambda x, forward=m.forward: forward(x),
    "with the context": lambda m: lambda x, context, f=m.forward: f(x, context=context),
    "a compiled one": lambda m: torch.compile(m.forward_features, backend="eager"),
}


@pytest.mark.parametrize("trace", [True, False])
@pytest.mark.parametrize("kind", SET)
def test_a_forward_set_after_conversion_gets_the_context(kind, trace):
    model = normswap.convert(Staged().eval(), "cn", contexts=3, trace=trace)
    separate(model)
    whole = kind in ("around it", "with the context")
    with normswap.use_context(model, LABELS):
        expected = (model if whole else model.forward_features)(images())
    model.forward = SET[kind](model)
    for each in (model, copy.deepcopy(model)) if kind == "a method" else (model,):
        close([each(images(), context=LABELS)], [expected])
    del model.forward
    assert model(images(), context=LABELS).shape == (len(LABELS), 2)


def test_hooks_run():
    class Model(Holder):
        def forward(self, x):
            return self.b(self.a(x))

    model = Model()
    seen = []
    model.a.norm.register_forward_hook(lambda module, args, output: seen.append("norm"))
    model.b.register_forward_hook(lambda module, args, output: output * 2)
    check(model)
    assert seen


@pytest.mark.filterwarnings("ignore")
def test_tracing_a_converted_model_to_a_script():
    converted = check(_sequential())
    converted.requires_grad_(False)
    with torch.no_grad():
        traced = torch.jit.trace(lambda x, c: converted(x, context=c), (images(), LABELS))
    flipped = LABELS.flip(0)
    close([traced(images(), flipped)], call(converted, (images(),), context=flipped))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model = _sequential().eval().to(dtype)
    converted = normswap.convert(model, "cn", contexts=3, verify=False)
    x = images().to(dtype)
    output, expected = converted(x, context=LABELS), model(x)
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)


def test_on_the_meta_device():
    converted = normswap.convert(_sequential().to("meta"), "cn", contexts=3, verify=False)
    assert converted(images().to("meta"), context=LABELS.to("meta")).shape == (4, CHANNELS, 6, 6)


def test_replicas_share_no_state_that_breaks_them():
    converted = check(_sequential())
    replica = copy.copy(converted)
    replica._modules = {k: copy.copy(m) for k, m in converted._modules.items()}
    close(call(replica, (images(),), context=LABELS), call(converted, (images(),), context=LABELS))


def test_unreached_norms_are_reported():
    class Model(Holder):
        def forward(self, x):
            return self.a(x)

    report = normswap.summary(check(Model()))
    assert [r.delivery for r in report.rows] == ["threaded", "unreached"]


def test_training_gradients_reach_every_context_of_the_batch():
    converted = normswap.convert(_sequential(), "cn", contexts=4, verify=False)
    separate(converted)
    converted(images(), context=LABELS).pow(2).sum().backward()
    gradient = converted[1].weight.grad
    assert gradient.isfinite().all()
    assert (gradient[:3] != 0).any(1).all()
    assert not gradient[3].any()


def test_a_parent_is_traced_anew_where_an_alike_child_returns_something_else():
    class Maybe(Block):
        def __init__(self, on):
            super().__init__()
            self.on = on

        def forward(self, x):
            return super().forward(x) if self.on else None

    class Parent(Block):
        def __init__(self, on):
            super().__init__()
            self.maybe = Maybe(on)

        def forward(self, x):
            y = super().forward(x)
            extra = self.maybe(x)
            return y if extra is None else y + 3 * extra

    model = nn.Sequential(Parent(True), Parent(False), Parent(True))
    check(model)


@pytest.mark.parametrize("inplace", [True, False])
def test_a_module_that_refuses_attributes(inplace):
    class Locked(Block):
        def __setattr__(self, name, value):
            if vars(self).get("locked") and name != "training":
                raise AttributeError(f"cannot set {name}")
            super().__setattr__(name, value)

    model = nn.Sequential(Locked()).eval()
    model[0].locked = True
    expected = model(images())
    converted = normswap.convert(model, "cn", contexts=3, inplace=inplace)
    close(converted(images(), context=LABELS), expected)
    assert type(normswap.revert(converted, inplace=inplace)[0]) is Locked
