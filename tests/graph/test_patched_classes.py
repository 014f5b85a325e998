"""What others set on the class of a converted model, as profilers and mocks do, and take back."""

import functools
from unittest import mock

import pytest
import torch

import normswap
from tests.support.behave import LABELS, Block, close, images, separate


class Part(Block):
    """A part that is patched in some tests."""

    def shift(self, x):
        return x + 1

    def forward(self, x):
        return self.shift(super().forward(x))


class Model(Part):
    """Overrides a method that it inherits, too."""

    steps = 0

    def __init__(self):
        super().__init__()
        self.part = Part()

    def shift(self, x):
        return self.part(x) * 2

    def __setattr__(self, name, value):
        super().__setattr__(name, value)

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)

    def count(self):
        type(self).steps += 1

    @classmethod
    def forget(cls):
        cls.steps = 0


@pytest.fixture(params=[True, False], ids=["traced", "not traced"])
def converted(request):
    model = normswap.convert(Model().eval(), "cn", contexts=3, trace=request.param)
    separate(model)
    with torch.no_grad():
        yield model


def run(model):
    return model(images(), context=LABELS)


@pytest.fixture(autouse=True)
def classes_stay():
    before = [dict(vars(cls)) for cls in (Model, Part)]
    yield
    assert [dict(vars(cls)) for cls in (Model, Part)] == before
    assert Model()(images()).shape == images().shape


WRAPPERS = {
    "any arguments": lambda f, seen: lambda self, *a, **k: seen.append(1) or f(self, *a, **k),
    "its own": lambda f, seen: lambda self, x: seen.append(1) or f(self, x),
    "wraps": lambda f, seen: functools.wraps(f)(WRAPPERS["any arguments"](f, seen)),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapped_forward_of_any_class(converted, kind):
    expected, seen, plain = run(converted), [], Model()
    for cls in (type(converted), type(converted.part)):
        cls.forward = WRAPPERS[kind](cls.forward, seen)
    close([run(converted)], [expected])
    assert len(seen) >= 2
    seen.clear()
    plain(images())
    assert not seen
    for cls in (type(converted), type(converted.part)):
        del cls.forward
    close([run(converted)], [expected])
    assert not seen


def test_a_mock_of_the_forward(converted):
    expected, cls = run(converted), type(converted)
    with mock.patch.object(cls, "forward", autospec=True, side_effect=cls.forward) as seen:
        close([run(converted)], [expected])
    assert seen.call_count >= 1
    close([run(converted)], [expected])


@pytest.mark.parametrize("name", ["forward", "shift", "__call__", "__setattr__", "new"])
def test_what_a_test_sets_it_takes_back(converted, name):
    expected, seen = run(converted), []
    old = getattr(type(converted), name, lambda self: None)
    with mock.patch.object(type(converted), "shift"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(converted), name, WRAPPERS["any arguments"](old, seen), raising=False)
    type(converted).forward = old = WRAPPERS["its own"](type(converted).forward, seen)
    assert type(converted).forward is old
    del type(converted).forward
    close([run(converted)], [expected])


def test_what_the_model_sets_on_its_class_is_on_the_original(converted):
    converted.count()
    assert Model.steps == converted.steps == 1
    converted.forget()
    assert Model.steps == 0
