"""The class of a converted container: made without the user's hooks, else like its base."""

import abc
import copy
import io
import pickle
import typing

import pytest
import torch
from torch import nn

import normswap
from tests.support.behave import LABELS, Block, Holder, call, check, close, images

SEEN: list[object] = []
T = typing.TypeVar("T")


class Registered:
    """Notes every subclass, which has to say of what kind it is."""

    def __init_subclass__(cls, kind, **kwargs):
        super().__init_subclass__(**kwargs)
        SEEN.append((cls, kind))


class Meta(abc.ABCMeta):
    """Notes every class it makes."""

    def __new__(mcs, *args, **kwargs):
        SEEN.append("new")
        return super().__new__(mcs, *args, **kwargs)

    def __init__(cls, name, bases, body, **kwargs):
        super().__init__(name, bases, body)
        SEEN.append("init")


class Kinds(Registered, Holder, metaclass=Meta, kind="x"):
    """Docstring."""

    def forward(self, x):
        return self.b(self.a(x))


class Slotted(Registered, Holder, kind="slots"):
    __slots__ = ("gain",)

    def __init__(self):
        super().__init__()
        self.gain = 2.0

    def __getstate__(self):
        return {**vars(self), "gain": self.gain}

    def __setstate__(self, state):
        self.gain = state.pop("gain")
        super().__setstate__(state)

    @property
    def double(self):
        return 2 * self.gain

    def forward(self, x):
        return self.b(self.a(x)) * self.double


class Template(Holder, typing.Generic[T]):
    def forward(self, x):
        return self.b(self.a(x))


class AbstractFirst(abc.ABC, Block):
    """Laid out otherwise in memory, since its first base has no attributes."""


class GenericFirst(typing.Generic[T], Registered, Block, kind="generic"):
    pass


class Last(Block):
    def __init__(self):
        super().__init__()
        self.last = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.last(super().forward(x))


CLASSES = [Kinds, Slotted, Template, AbstractFirst, GenericFirst, Last]


@pytest.mark.parametrize("cls", CLASSES)
def test_conversion_copy_and_pickle_run_no_hook(cls):
    before = list(SEEN)
    converted = check(cls())
    twin = copy.deepcopy(converted)
    buffer = io.BytesIO()
    torch.save(converted, buffer)
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    pickled = pickle.loads(pickle.dumps(converted))
    assert before == SEEN
    expected = call(converted, (images(),), context=LABELS)
    for other in (twin, loaded, pickled):
        assert type(other) is type(converted)
        close(call(other, (images(),), context=LABELS), expected)


@pytest.mark.parametrize("cls", CLASSES)
def test_the_class_shows_itself_as_its_base_does(cls):
    converted = normswap.convert(cls(), "cn", verify=False)
    made = type(converted)
    assert made.__bases__ == (cls,)
    assert isinstance(made, type(cls))
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(made, name) == getattr(cls, name)
    assert isinstance(converted, cls)
    assert not isinstance(cls(), made)
    assert isinstance(cls(), cls)
    assert repr(converted).startswith(cls.__name__ + "(")


def test_a_subclass_of_a_converted_class_runs_the_hook_again():
    converted = normswap.convert(Kinds(), "cn", verify=False)
    child = Meta("Child", (type(converted),), {}, kind="later")
    assert SEEN[-3:] == ["new", (child, "later"), "init"]


def test_what_is_set_on_a_subclass_of_a_converted_class_stays_there():
    made = type(normswap.convert(Last(), "cn", verify=False))
    child = type(made)("Child", (made,), {})
    child.__name__, child.note = "Renamed", 1
    assert (child.__name__, child.note, Last.__name__) == ("Renamed", 1, "Last")
    del child.note
    assert not hasattr(child, "note")
    assert not hasattr(Last, "note")


def test_an_abstract_class_may_stand_beside_a_converted_class():
    model = normswap.convert(Last(), "cn", contexts=3, verify=False).eval()
    expected = call(model, (images(),), context=LABELS)

    class Patched(type(model), abc.ABC):
        """As `higher` makes one of each module's class."""

    twin = copy.deepcopy(model)
    twin.__class__ = Patched
    close(call(twin, (images(),), context=LABELS), expected)


def test_classes_registered_with_an_abstract_class_stay_so():
    class Abstract(Last, abc.ABC):
        pass

    Abstract.register(Holder)
    model = normswap.convert(Abstract(), "cn", verify=False)
    assert issubclass(Holder, Abstract)
    assert not issubclass(Holder, type(model))


def test_reverting_gives_the_class_back():
    model = normswap.convert(Kinds(), "cn", contexts=2, verify=False)
    assert type(normswap.revert(model)) is Kinds


class Doubling(Holder):
    def __call__(self, x, **kwargs):
        return super().__call__(2 * x, **kwargs)

    def forward(self, x):
        return self.b(self.a(x))


class DoublingOnly(Doubling):
    def __call__(self, x):
        return nn.Module.__call__(self, 2 * x)


class Keeping(Doubling):
    """Takes the context for itself, by its own name."""

    def __call__(self, x, context=None):
        y = nn.Module.__call__(self, 2 * x)
        return y if context is None else y + context


class Parent(nn.Module):
    def __init__(self, child):
        super().__init__()
        self.child = child
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.child(x))


@pytest.mark.parametrize("cls", [Doubling, DoublingOnly, Keeping])
def test_an_own_call_runs_once_at_the_root(cls):
    converted = check(cls())
    calls = []
    converted.a.register_forward_pre_hook(lambda module, args: calls.append(args[0]))
    converted(images())
    (given,) = calls
    torch.testing.assert_close(given, 2 * images())


@pytest.mark.parametrize("cls", [Doubling, DoublingOnly, Keeping])
@pytest.mark.parametrize("depth", [1, 2])
def test_an_own_call_runs_once_in_a_child(cls, depth):
    model = cls()
    for _ in range(depth):
        model = Parent(model)
    converted = check(model, opaque="own __call__" if depth == 1 else None)
    calls = []
    inner = converted.child if depth == 1 else converted.child.child
    inner.a.register_forward_pre_hook(lambda module, args: calls.append(args[0]))
    converted.train()(images(), context=LABELS).sum().backward()
    assert len(calls) == 1
    torch.testing.assert_close(calls[0], 2 * images())


def test_the_own_context_of_a_call_stays_its_own():
    converted = check(Keeping())
    given = torch.ones(4, 1, 1, 1)
    plain = call(converted, (images(),), norm_context=LABELS)
    close(call(converted, (images(), given), norm_context=LABELS), [plain[0] + 1])


def test_wrong_labels_are_refused_before_an_own_call_runs():
    converted = normswap.convert(Doubling(), "cn", contexts=3, verify=False)
    with pytest.raises(normswap.ContextError, match="values from 0 to 3"):
        converted(images(), context=torch.tensor([0, 1, 2, 3]))
    with pytest.raises(normswap.ContextError, match="expected `context` with 4 labels"):
        converted(images(), context=torch.tensor([0, 1]))


class Binding(Holder):
    """Has names of its own for what a converted class has, too."""

    conversion, context_argument, forward_is_bound, converted_from = 2.0, 3.0, 5.0, 7.0

    def bind(self, x):
        return x * self.conversion * self.context_argument

    def spread(self, x):
        return x + self.forward_is_bound * self.converted_from

    def forward(self, x):
        return self.spread(self.bind(self.b(self.a(x))))


def test_a_converted_class_takes_no_name_from_its_base():
    converted = check(Binding(), x=images())
    added = {name for name in vars(type(converted)) if not name.startswith("_")}
    assert added == {"forward"}
