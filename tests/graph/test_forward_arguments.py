"""Arguments and results of every shape reach the forward as they were given."""

import dataclasses
import enum
import functools
import inspect
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

import normswap
from tests.support.behave import CHANNELS, LABELS, Block, Holder, check, images


class Mode(enum.IntEnum):
    PLAIN = 1
    TWICE = 2


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    y: torch.Tensor | None = None


Pair = namedtuple("Pair", "a b")


def test_keyword_only_arguments():
    class Model(Holder):
        def forward(self, *, x, scale=1.0, skip=None):
            y = self.b(self.a(x)) * scale
            return y if skip is None else y + skip

    check(Model(), x=images(), scale=2.0)
    check(Model(), x=images(), skip=images())


def test_each_set_of_optional_arguments_takes_its_own_branch():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(CHANNELS)

        def forward(self, x, skip=None, twice=False):
            if skip is not None:
                x = x + skip
            return self.norm(x * 2 if twice else x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(x) + self.inner(x, x * 2) + self.inner(x, twice=True)

    check(Model())


def test_dicts_lists_and_tuples():
    class Model(Holder):
        def forward(self, batch):
            y = self.b(self.a(batch["image"])) * batch["mask"]
            if "extra" in batch:
                y = y + batch["extra"]
            return {"logits": y, "features": [y * 2, (y,)]}

    batch = {"image": images(), "mask": torch.rand(4, 1, 6, 6)}
    check(Model(), batch)
    check(Model(), {**batch, "extra": images()})
    check(Model(), OrderedDict(batch), opaque="takes a OrderedDict")


def test_a_dataclass():
    class Model(Holder):
        def forward(self, batch):
            return Batch(self.b(self.a(batch.x)))

    check(Model(), Batch(images()), opaque="takes a Batch")


class Output(OrderedDict):
    """What forwards of transformers return: it looks at what it is made of."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            try:
                len(getattr(self, field.name))
            except TypeError:
                continue
            self[field.name] = getattr(self, field.name)

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


@dataclasses.dataclass
class Encoded(Output):
    last: torch.Tensor = None
    states: tuple = None


def test_a_dict_that_is_a_dataclass_is_made_anew_in_each_run():
    class Model(Holder):
        def forward(self, x):
            y = self.a(x)
            inner = Encoded(last=y, states=(x, y))
            return Encoded(last=self.b(inner.last) + inner[1][0] + inner["last"])

    converted = check(Model(), opaque="makes or hands on a Encoded")
    found = converted(images(), context=LABELS)
    assert type(found) is Encoded
    assert list(found) == ["last"]
    assert found.states is None
    assert "__new__" not in vars(Encoded)


def test_a_dict_that_is_a_dataclass_and_holds_a_list():
    class Model(Holder):
        def forward(self, x):
            states = [self.a(x)]
            output = Encoded(last=self.b(x), states=states)
            states.append(x)
            return output

    check(Model(), opaque="makes or hands on a Encoded")


def test_a_namedtuple_result():
    class Model(Holder):
        def forward(self, x):
            y = self.a(x)
            return Pair(y, b=self.b(y))

    converted = check(Model(), opaque="makes or hands on a Pair")
    assert isinstance(converted(images(), context=LABELS), Pair)


def test_variable_arguments():
    class Model(Holder):
        def forward(self, *xs, **options):
            return sum(self.b(self.a(x)) for x in xs) * options.get("gain", 1)

    check(Model(), images(), images() * 2)


@pytest.mark.parametrize("mode", list(Mode))
def test_an_enum_is_itself_in_the_forward(mode):
    class Model(Holder):
        def forward(self, x, mode=Mode.PLAIN):
            y = self.b(self.a(x))
            return y * 2 if mode is Mode.TWICE else y

    check(Model(), images(), mode, opaque="goes by forward, whose defaults")


def test_an_argument_that_is_called_context_stays():
    class Model(Holder):
        def forward(self, x, context):
            return self.b(self.a(x)) * context

    converted = check(Model(), images(), torch.rand(4, 1, 1, 1))
    assert type(converted)._normswap_argument == "norm_context"


@pytest.mark.parametrize("ask", ["type", "callable", "getattr", "match", "jit"])
def test_a_forward_may_ask_what_its_argument_is(ask):
    class Model(Holder):
        def forward(self, x):
            y = self.b(self.a(x))
            if self.ask == "type":
                return y if type(x) is torch.Tensor else y * 3
            if self.ask == "callable":
                return y * 3 if callable(x) else y
            if self.ask == "getattr":
                return y * 3 if getattr(x, "logits", None) is not None else y
            if self.ask == "jit":
                return y if torch.jit.isinstance(x, torch.Tensor) else y * 3
            match x:
                case torch.Tensor():
                    return y
            return y * 3

    Model.ask = ask
    why = {
        "match": "is another object",
        "type": "asks for the type of a value",
        "getattr": "looks up .logits of",
        "callable": "calls callable()",
        "jit": "calls torch.jit",
    }
    check(Model(), opaque=why[ask])


def test_a_decorator_sees_only_what_was_given():
    def forced(function):
        @functools.wraps(function)
        def wrapper(self, *args, **kwargs):
            assert "twice" not in kwargs
            return function(self, *args, twice=True, **kwargs)

        return wrapper

    class Model(Holder):
        @forced
        def forward(self, x, skip=None, twice=None):
            y = self.b(self.a(x))
            return y * 2 if twice else y

    converted = check(Model(), opaque="reads function, a variable of a function that made it")
    shown = list(inspect.signature(converted.forward).parameters)
    assert shown == ["x", "skip", "twice", "context"]


def test_a_decorator_may_show_other_parameters_than_it_takes():
    def shown(function):
        def forward(*args, **kwargs):
            return function(*args, **kwargs)

        # As tensordict shows its forwards: what is any number of arguments has a default here.
        names = ("self", "x", "args")
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, kind, default=None) for name in names]
        forward.__signature__ = inspect.Signature(parameters)
        return forward

    class Model(Holder):
        @shown
        def forward(self, x, *args):
            assert not args
            return self.b(self.a(x))

    check(Model(), images(), opaque="goes by forward, whose defaults or attributes may change")


def test_a_function_that_a_decorator_calls_may_become_another():
    def calling(function):
        def wrapper(self, x):
            return function(self, x)

        def replace(other):
            nonlocal function
            function = other

        wrapper.replace = replace
        return wrapper

    class Model(Holder):
        @calling
        def forward(self, x):
            return self.b(self.a(x))

    converted = check(Model(), opaque="reads function, a variable of a function that made it")
    x = images()
    expected = converted.b(converted.a(x, context=LABELS), context=LABELS) * 3
    assert not torch.equal(converted(x, context=LABELS), expected)
    Model.forward.replace(lambda self, x: self.b(self.a(x)) * 3)
    assert torch.equal(converted(x, context=LABELS), expected)


def test_labels_match_the_items_of_a_list_when_other_arguments_are_given():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, pictures, targets=None):
            y = self.block(torch.stack(pictures))
            return y if targets is None else y.mean() + sum(t["box"].sum() for t in targets)

    converted = normswap.convert(Model(), "cn", contexts=3, verify=False)
    targets = [{"box": torch.rand(2, 4), "label": torch.ones(2)} for _ in range(4)]
    converted(list(images()), targets, context=LABELS).backward()
    assert converted.block.norm.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ["isinstance", "type", "equal", "member"])
def test_a_forward_may_ask_for_the_type_of_a_setting(name):
    class Model(Holder):
        def __init__(self):
            super().__init__()
            self.size, self.flag = 3, True

        def forward(self, x):
            y = self.a(x)
            if self.name == "isinstance":
                found = isinstance(self.size, (int, float)) and not isinstance(self.size, float)
            elif self.name == "type":
                found = type(self.size) is int and type(self.flag) is bool
            elif self.name == "equal":
                found = type(self.size) == int and type(self.size / 2) != int  # noqa: E721
            else:
                found = type(self.size) in (int, float)
            return self.b(y) if found else y

    Model.name = name
    check(Model(), opaque=None if name == "isinstance" else "asks for the type of a value")
