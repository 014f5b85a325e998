"""The name of the context argument: never one that the model's own code takes."""

import inspect
import types

import pytest
import torch
from torch import nn

import normswap
from tests.support.behave import Block, Holder, check, images

GIVEN = torch.full((4, 1, 1, 1), 0.5)


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x, context=None):
        y = self.block(x)
        return y if context is None else y + context


class Keyed(Conditioned):
    def forward(self, x, **given):
        y = self.block(x)
        return y + given["context"] if "context" in given else y


class Helped(Conditioned):
    def forward(self, x, **given):
        return self.run(x, **given)

    def run(self, x, *, context=None):
        return Conditioned.forward(self, x, context)


class Handing(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, **given):
        return self.inner(x, **given)


class Plain(nn.Module):
    """Holds no norm, takes a context."""

    def forward(self, x, context=None):
        return x if context is None else x + context


class Beside(Handing):
    def __init__(self):
        super().__init__(Plain())
        self.block = Block()

    def forward(self, x, **given):
        return self.block(self.inner(x, **given))


class Named(Handing):
    def forward(self, x, **given):
        return self.inner(x, **given)

    def __call__(self, x, context=None, **given):
        return super().__call__(x, context=context, **given)


MODELS = [
    Conditioned,
    Keyed,
    Helped,
    lambda: Handing(Conditioned()),
    lambda: Handing(Handing(Keyed())),
    lambda: Named(Helped()),
    Beside,
]


@pytest.mark.parametrize("make", MODELS)
def test_the_models_own_context_stays_its_own(make):
    converted = check(make(), x=images(), context=GIVEN)
    assert type(converted)._normswap_argument == "norm_context"
    assert "norm_context" in inspect.signature(converted.forward).parameters
    assert "labels: norm_context=, since" in str(normswap.summary(converted))


def test_a_forward_set_on_the_instance_may_take_a_context():
    def forward(self, x, context=None):
        return self.inner(x, context=context)

    model = Handing(Conditioned())
    model.forward = types.MethodType(forward, model)
    converted = check(model, x=images(), context=GIVEN, opaque="replaced on the instance")
    assert type(converted)._normswap_argument == "norm_context"


def test_a_model_that_takes_both_names_keeps_both():
    class Both(Conditioned):
        def forward(self, x, context=None, norm_context=1.0):
            return super().forward(x, context) * norm_context

    converted = check(Both(), x=images(), context=GIVEN, norm_context=2.0)
    assert type(converted)._normswap_argument == "norm_norm_context"


def test_keywords_that_no_module_takes_leave_the_name_alone():
    converted = check(Handing(Handing(Block())))
    assert type(converted)._normswap_argument == "context"
    assert "a context= of its own" not in str(normswap.summary(converted))
    model = normswap.convert(Handing(nn.Sequential(Conditioned())), "cn", contexts=2, verify=False)
    assert type(model.inner)._normswap_argument == "context"


def test_the_converted_root_of_an_outer_model_is_named_before_its_children_change():
    shared = Conditioned()

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = shared, Handing(shared)

        def forward(self, x, **given):
            return self.second(self.first(x, **given), **given)

    converted = check(Twice(), x=images(), context=GIVEN)
    names = {type(m)._normswap_argument for m in (converted, converted.first, converted.second)}
    assert names == {"norm_context"}


def test_an_input_that_may_be_left_out_is_taken_to_be_given():
    class Model(Holder):
        def forward(self, x=None, mask=None):
            if x is None:
                raise ValueError("expected an input")
            y = self.b(self.a(x))
            return y if mask is None else y * mask

    report = normswap.summary(normswap.convert(Model(), "cn", contexts=3))
    assert not report.opaque
    check(Model())


def test_parameters_may_have_the_names_that_written_code_takes():
    class Model(Holder):
        def forward(self, function, values, dispatch=2.0, _dispatch=3.0, _function=5.0):
            return self.b(self.a(function)) * values * dispatch * _dispatch * _function

    check(Model(), images(), GIVEN)
