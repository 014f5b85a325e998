"""Functions on a model that hold parts of it: a copy would share them, so none is made."""

import copy
import functools
import types
import weakref

import pytest
import torch
from torch import nn

import normswap
from tests.support.behave import LABELS, Block, close, images, separate


class Acting(nn.Module):
    """Runs whatever its attribute `act` is."""

    def __init__(self):
        super().__init__()
        self.block = Block()
        self.norm = nn.BatchNorm2d(4)
        self.act = None

    def run(self, x):
        return self.norm(x).relu()

    def forward(self, x):
        return self.act(self.block(x))


class Caller:
    """An object that runs a function."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)


OTHER = nn.BatchNorm2d(4)
GLOBAL = Acting()


def closure(model):
    return lambda x: model.norm(x).relu()


def norm_in_closure(model):
    norm = model.norm
    return lambda x: norm(x).relu()


def default(model):
    return lambda x, norm=model.norm: norm(x).relu()


def keyword_default(model):
    def act(x, *, norms=(model.norm,)):
        return norms[0](x).relu()

    return act


def nested(model):
    def act(x):
        def inner():
            return model.norm(x)

        return inner().relu()

    return act


def partial_of_closure(model):
    return functools.partial(closure(model))


def object_of_closure(model):
    return Caller(closure(model))


def closure_of_method(model):
    run = model.run
    return lambda x: run(x)


def closure_of_object(model):
    caller = Caller(model.norm)
    return lambda x: caller(x).relu()


def named_global(model):
    return lambda x: GLOBAL.norm(x).relu()


def wrapped(model):
    return functools.wraps(model.run)(lambda x: model.run(x))


def tensor(model):
    weight = model.norm.weight
    return lambda x: x * weight.reshape(1, -1, 1, 1)


def make(kind):
    model = GLOBAL if kind is named_global else Acting()
    model.act = kind(model)
    return model.eval()


PINNED = [
    closure,
    norm_in_closure,
    default,
    keyword_default,
    nested,
    partial_of_closure,
    object_of_closure,
    closure_of_method,
    closure_of_object,
    named_global,
    wrapped,
    tensor,
]
DIRECT = [norm_in_closure, default, keyword_default, closure_of_object]


@pytest.mark.parametrize("kind", PINNED)
def test_a_function_that_holds_parts_of_the_model_is_refused_in_a_copy(kind):
    model = make(kind)
    with pytest.raises(normswap.ConversionError, match=r"act holds a function.*inplace=True"):
        normswap.convert(model, "cn", verify=False)
    assert type(model.norm) is nn.BatchNorm2d


@pytest.mark.parametrize("kind", [k for k in PINNED if k not in (*DIRECT, named_global, tensor)])
def test_in_place_such_a_function_runs_the_layer(kind):
    model = make(kind)
    x = images()
    with torch.no_grad():
        expected = model(x)
        converted = normswap.convert(model, "cn", contexts=3, inplace=True, verify=False)
        close([converted(x, context=LABELS)], [expected])
        separate(converted)
        mixed = converted(x, context=LABELS)
        single = [converted(x[i : i + 1], context=LABELS[i : i + 1]) for i in range(4)]
    close([mixed], [torch.cat(single)])
    assert not torch.allclose(mixed, expected)


@pytest.mark.parametrize("kind", DIRECT)
def test_in_place_a_function_that_holds_the_norm_itself_is_refused(kind):
    model = make(kind)
    with pytest.raises(normswap.ConversionError, match=r"in a function.*exclude="):
        normswap.convert(model, "cn", inplace=True, verify=False)
    assert type(model.norm) is nn.BatchNorm2d
    converted = normswap.convert(model, "cn", exclude="norm", inplace=True, verify=False)
    assert type(converted.norm) is nn.BatchNorm2d


@pytest.mark.parametrize("register", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_hooks_that_hold_parts_of_the_model_are_refused_in_a_copy(register):
    model = make(lambda model: nn.ReLU())
    getattr(model.block, f"register_{register}")(lambda *given: model.norm(given[1]))
    with pytest.raises(normswap.ConversionError, match=r"block\._.*hooks holds a function"):
        normswap.convert(model, "cn", verify=False)


FREE = {
    "method of the model": lambda model: model.run,
    "method of another": lambda model: types.MethodType(lambda self, x: self.norm(x), model),
    "partial": lambda model: functools.partial(Acting.run, model),
    "free function": lambda model: torch.relu,
    "another module": lambda model: lambda x, norm=OTHER: norm(x),
    "constants": lambda model: lambda x, scale=2.0: x * scale,
}


@pytest.mark.parametrize("kind", FREE)
def test_functions_that_are_copied_or_hold_nothing_are_not(kind):
    model = make(FREE[kind])
    with torch.no_grad():
        expected = model(images())
        converted = normswap.convert(model, "cn", verify=False)
        close([converted(images())], [expected])
    original = {id(m) for m in model.modules()}
    assert not original & {id(m) for m in converted.modules()}


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("given", [lambda norm: ((norm,), {}), lambda norm: ((), {"norm": norm})])
def test_a_partial_that_holds_the_norm_itself_is_refused(given, inplace):
    model = Acting()
    args, named = given(model.norm)
    model.act = functools.partial(lambda *values, norm=None: values[-1], *args, **named)
    with pytest.raises(normswap.ConversionError, match=r"act holds a norm.*exclude="):
        normswap.convert(model, "cn", inplace=inplace, verify=False)
    assert type(model.norm) is nn.BatchNorm2d


class Counting(nn.Module):
    """Counts its calls; its class keeps the instances, to reset them all."""

    def __init__(self, instances):
        super().__init__()
        self.calls = 0
        self.norm = nn.BatchNorm2d(4)
        instances(type(self), self)

    @classmethod
    def reset(cls):
        for one in cls.instances:
            one.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.norm(x) + self.calls


def in_list(cls, module):
    cls.instances = [module]


def in_set(cls, module):
    cls.instances = {module}


def in_weak_set(cls, module):
    cls.instances = weakref.WeakSet([module])


def in_keys(cls, module):
    cls.instances = {module: 0}


def in_weak_reference(cls, module):
    cls.instances = [weakref.ref(module)]


@pytest.mark.parametrize("keep", [in_list, in_set, in_weak_set, in_keys, in_weak_reference])
def test_a_class_that_lists_its_instances_would_miss_the_copy(keep):
    kind = type("Counted", (Counting,), {})
    model = nn.Sequential(nn.Conv2d(3, 4, 1), kind(keep)).eval()
    with pytest.raises(normswap.ConversionError, match=r"Counted\.instances holds the module 1,"):
        normswap.convert(model, "cn", verify=False)
    assert type(model[1].norm) is nn.BatchNorm2d
    converted = normswap.convert(copy.deepcopy(model), "cn", contexts=2, verify=False)
    assert type(normswap.revert(converted)[1].norm) is nn.BatchNorm2d


def test_in_place_such_a_class_resets_the_converted_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), type("Counted", (Counting,), {})(in_list)).eval()
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    converted = normswap.convert(model, "cn", contexts=2, inplace=True, verify=False)
    for _ in range(2):
        type(model[1]).reset()
        close([converted(x, context="1")], [expected])
    for back in (normswap.revert, lambda m, **how: normswap.specialize(m, "1", **how)):
        with pytest.raises(normswap.ConversionError, match=r"Counted\.instances.*inplace=True"):
            back(converted)
    plain = normswap.revert(converted, inplace=True)
    type(model[1]).reset()
    close([plain(x)], [expected])


def test_a_class_that_lists_instances_of_other_models_is_in_nobodys_way():
    kind = type("Counted", (Counting,), {})
    model, other = kind(in_list), kind(in_list)
    assert kind.instances == [other]
    assert type(normswap.convert(model, "cn", verify=False)).__name__ == "Counted"


def test_reverting_a_copy_whose_function_holds_a_part_is_refused():
    model = make(closure)
    converted = normswap.convert(model, "cn", contexts=2, inplace=True, verify=False)
    for back in (normswap.revert, lambda m, **how: normswap.specialize(m, "1", **how)):
        with pytest.raises(normswap.ConversionError, match=r"act holds a function.*inplace=True"):
            back(converted)
    plain = normswap.revert(converted, inplace=True)
    x = images()
    close([plain(x)], [plain.norm(plain.block(x)).relu()])
