"""What a forward may read and do, if a graph is to stand for it: later changes always count."""

import copy
import dataclasses
import enum

import pytest
import torch
from torch import nn

import normswap
from tests.support.behave import LABELS, Block, Holder, check, close, images, tensors

SCALE = 1.0
KINDS = (nn.BatchNorm2d, nn.GroupNorm)
SETTINGS = {"scale": 1.0}


class Base(Holder):
    factor = 1.0

    def __init__(self):
        super().__init__()
        self.extra = nn.ModuleList()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        return self.b(self.a(x))


class Constant(Base):
    def forward(self, x):
        return super().forward(x) * SCALE


class Builtin(Base):
    def forward(self, x):
        return super().forward(x) * abs(-2.0)


class Item(Base):
    def forward(self, x):
        return super().forward(x) * SETTINGS["scale"]


class OfClass(Base):
    def forward(self, x):
        return super().forward(x) * self.__class__.factor


class OfMethod(Base):
    def scale(self):
        return 1

    scale.by = 1.0

    def forward(self, x):
        return super().forward(x) * self.scale.by


class Extra(Base):
    def forward(self, x):
        return super().forward(x) * (1 + len(self.extra))


class Tuple(Base):
    def forward(self, x):
        y = super().forward(x)
        return y if isinstance(self.a.norm, KINDS) else y * 3


def set_extra(model, patch):
    model.extra.append(nn.Identity())


def set_base(model, patch):
    patch.setattr(Base, "forward", lambda self, x: self.a(x) * 5)


CHANGES = {
    Constant: lambda model, patch: patch.setitem(globals(), "SCALE", 3.0),
    Builtin: lambda model, patch: patch.setitem(globals(), "abs", lambda value: 5.0),
    Item: lambda model, patch: patch.setitem(SETTINGS, "scale", 3.0),
    OfClass: lambda model, patch: patch.setattr(OfClass, "factor", 3.0),
    OfMethod: lambda model, patch: patch.setattr(OfMethod.scale, "by", 3.0),
    Extra: set_extra,
    Tuple: set_base,
}


def run(model, **labels):
    with torch.no_grad():
        return tensors(model(images(), **labels))


@pytest.mark.parametrize("cls", CHANGES, ids=lambda cls: cls.__name__)
def test_what_is_changed_later_counts(cls, monkeypatch):
    model = cls().eval()
    converted = normswap.convert(model, "cn", contexts=3, verify=False)
    close(run(converted, context=LABELS), run(model))
    before = run(model)
    for each in (model, converted):
        CHANGES[cls](each, monkeypatch)
    assert not torch.allclose(run(model)[0], before[0])
    close(run(converted, context=LABELS), run(model))


@pytest.mark.parametrize("cls", [Constant, Builtin, Extra, Tuple], ids=lambda cls: cls.__name__)
def test_these_have_graphs(cls):
    check(cls())


class Stored(Base):
    def forward(self, x):
        object.__setattr__(self, "last", x.mean())
        return super().forward(x)


class Counted(Base):
    def forward(self, x):
        self._buffers["count"] = self._buffers["count"] + 1
        return super().forward(x) * self.count


class Listed(Base):
    def forward(self, x):
        self._modules["more"] = nn.Identity()
        return self._modules["more"](super().forward(x))


@pytest.mark.parametrize("cls", [Stored, Counted, Listed], ids=lambda cls: cls.__name__)
def test_what_goes_round_a_module_leaves_no_mark(cls):
    model = cls().eval()
    converted = normswap.convert(model, "cn", contexts=3, verify=False)
    for name in ("_buffers", "_modules"):
        assert list(getattr(converted, name)) == list(getattr(model, name))
    assert type(converted.count) is torch.Tensor
    assert not hasattr(converted, "last")
    twin = copy.deepcopy(model)
    for _ in range(2):
        close(run(converted, context=LABELS), run(twin))
    assert torch.equal(converted.count, twin.count)
    assert isinstance(converted.a, Block)


class Mode(enum.Enum):
    LOUD = "loud"

    def __init__(self, name):
        self.gain = 1.0


class Options:
    table = {"gain": 2.0}  # noqa: RUF012


@dataclasses.dataclass
class Gain:
    value: float = 1.0
    bias = 0.0

    def of(self, x):
        return x * self.value + self.bias


def scaled(size, by=1.0):
    return size * by


class Made(Base):
    def forward(self, x):
        return Gain().of(super().forward(x))


class Default(Base):
    def forward(self, x):
        return super().forward(x) * scaled(2)


class OfMember(Base):
    def forward(self, x):
        return super().forward(x) * Mode.LOUD.gain


class Renaming:
    gain = 1.0
    names = {"scale": "gain"}  # noqa: RUF012

    def __getattribute__(self, name):
        return super().__getattribute__(super().__getattribute__("names").get(name, name))


class OfSettings(Base):
    def __init__(self):
        super().__init__()
        self.settings = Renaming()

    def forward(self, x):
        return super().forward(x) * self.settings.scale


class Unused(Base):
    def forward(self, x):
        y = super().forward(x)
        return y * Options().table["gain"] if self.extra else y


@pytest.mark.parametrize("cls", [Default, Unused], ids=lambda cls: cls.__name__)
def test_what_can_be_compared_as_a_whole_has_a_graph(cls):
    check(cls())


OBJECTS = {
    Made: "makes or hands on a Gain",
    OfMember: "reads Mode.LOUD, a Mode outside of it that may change",
    OfSettings: "reads .settings, a Renaming",
}


@pytest.mark.parametrize("cls", OBJECTS, ids=lambda cls: cls.__name__)
def test_objects_of_other_classes_scope_a_forward(cls):
    check(cls(), opaque=OBJECTS[cls])


class Counting(Base):
    def forward(self, x):
        return super().forward([x][1])


class Raising(Base):
    def forward(self, x):
        if not isinstance(x, list):
            raise ValueError("give a list")
        return super().forward(x[0])


class Handing(Base):
    def forward(self, x):
        return self.b(self.a(x), object())


@torch.compiler.disable
def double(x):
    return x * 2


class ByAFunction(Base):
    def forward(self, x):
        return double(super().forward(x))


class ByAMethod(Base):
    @torch.compiler.disable
    def double(self, x):
        return x * 2

    def forward(self, x):
        return self.double(super().forward(x))


REASONS = {
    Counting: "fails at `return super().forward([x][1])` on stand-ins",
    Raising: 'fails at `raise ValueError("give a list")` on stand-ins',
    Handing: "hands on an object of class object",
    ByAFunction: "calls double(), which stays out of compiled code",
    ByAMethod: "calls double(), which stays out of compiled code",
}


@pytest.mark.parametrize("cls", REASONS, ids=lambda cls: cls.__name__)
def test_a_reason_says_what_the_forward_does(cls):
    reason = normswap.plan(cls(), "cn", contexts=2).opaque[""]
    assert reason.startswith(REASONS[cls])


def test_a_number_changed_again_counts_when_compiled(monkeypatch):
    torch.compiler.reset()
    converted = normswap.convert(Constant().eval(), "cn", contexts=3, verify=False)
    compiled = torch.compile(converted, backend="eager", fullgraph=True)
    before = run(compiled, context=LABELS)[0]
    for scale in (3.0, 5.0):
        monkeypatch.setitem(globals(), "SCALE", scale)
        torch.testing.assert_close(run(compiled, context=LABELS)[0], before * scale)
