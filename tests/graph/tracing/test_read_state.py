"""What a forward reads at the time of a run, by whatever way; and that tracing changes nothing."""

import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import gelu

import normswap
from tests.support.behave import CHANNELS, LABELS, Block, call, close, images


class Numbers:
    gain = 1.0
    runs = 0


class Base(Block):
    gain = 1.0

    def shift(self, x):
        return x + 1


class Reader(Base):
    gain = 2.0

    def __init__(self):
        super().__init__()
        self.options = types.SimpleNamespace(gain=3.0)
        self.more = nn.ModuleList()
        self.last = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def shift(self, x):
        return x - 1

    def read(self, x):
        raise NotImplementedError

    def forward(self, x):
        return self.read(super().forward(x))


class Inherited(Reader):
    def read(self, x):
        return x * super().gain

    def change(self):
        Reader.gain = 5.0


class InheritedMethod(Reader):
    def shift(self, x):
        return x

    def read(self, x):
        return super().shift(x)

    def change(self):
        Reader.shift = lambda self, x: x * 4


class LookedUp(Reader):
    def read(self, x):
        return x * getattr(Numbers, "gain")  # noqa: B009

    def change(self):
        Numbers.gain = 5.0


class GivenAnotherName(Reader):
    def read(self, x):
        chosen = Numbers if self.options.gain else Reader
        return x * chosen.gain

    def change(self):
        Numbers.gain = 5.0


class AnObjectOrNone(Reader):
    def read(self, x):
        return x * 2 if self.options else x

    def change(self):
        self.options = None


class HowMany(Reader):
    def read(self, x):
        return x * (1 + len(self.more))

    def change(self):
        self.more.append(nn.ReLU())


class ATensorOrNone(Reader):
    def read(self, x):
        return x * 2 if self.last.bias is None else x

    def change(self):
        self.last.bias = None


class AGradientOrNone(Reader):
    def read(self, x):
        return x * 2 if self.last.weight.grad is None else x

    def change(self):
        self.last.weight.grad = torch.ones_like(self.last.weight)


class AnAttributeByName(Reader):
    def read(self, x):
        return x * 2 if hasattr(self.last, "kept") else x

    def change(self):
        self.last.kept = 1


class ASettingByName(Reader):
    def read(self, x):
        return x * getattr(self.options, "scale", 1.0)

    def change(self):
        self.options.scale = 5.0


class HowManyParameters(Reader):
    def __init__(self):
        super().__init__()
        self.gains = nn.ParameterList()

    def read(self, x):
        return x * (1 + len(self.gains))

    def change(self):
        self.gains.append(nn.Parameter(torch.ones(1)))


READERS = [
    AnAttributeByName,
    ASettingByName,
    HowManyParameters,
    Inherited,
    InheritedMethod,
    LookedUp,
    GivenAnotherName,
    AnObjectOrNone,
    HowMany,
]
READERS += [ATensorOrNone, AGradientOrNone]


@pytest.mark.parametrize("kind", READERS)
def test_what_is_read_has_its_value_at_the_time_of_the_run(kind, monkeypatch):
    for owner, name in ((Numbers, "gain"), (Reader, "gain"), (Reader, "shift")):
        monkeypatch.setattr(owner, name, vars(owner)[name])
    model = kind().eval()
    converted = normswap.convert(model, "cn", contexts=3, verify=False)
    close(call(converted, (images(),), context=LABELS), call(model, (images(),)))
    for changed in (model, converted):
        changed.change()
    close(call(converted, (images(),), context=LABELS), call(model, (images(),)))


class Functional(Block):
    def forward(self, x):
        y = torch.tanh(gelu(super().forward(x)))
        return F.scaled_dot_product_attention(y, y, y) + math.sqrt(2.0)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (F, "scaled_dot_product_attention"),  # as packages of faster attention do
        (torch, "tanh"),
        (math, "sqrt"),
        (sys.modules[__name__], "gelu"),
    ],
)
def test_a_function_of_torch_that_is_exchanged_later_is_called(owner, name, monkeypatch):
    model = Functional().eval()
    converted = normswap.convert(model, "cn", contexts=3, verify=False)
    assert not normswap.summary(converted).opaque
    before = call(model, (images(),))
    close(call(converted, (images(),), context=LABELS), before)
    with monkeypatch.context() as patches:
        patches.setattr(owner, name, lambda x, *others: 3 * x + 1)
        close(call(converted, (images(),), context=LABELS), call(model, (images(),)))
    close(call(converted, (images(),), context=LABELS), before)


class Writer(Block):
    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, x):
        self.write(x)
        return super().forward(x)


class PastTheModule(Writer):
    def write(self, x):
        object.__setattr__(self, "seen", self.seen + 1)

    def count(self):
        return self.seen


class OnAClass(Writer):
    def write(self, x):
        Numbers.runs += 1

    def count(self):
        return Numbers.runs


class Registered(Writer):
    def write(self, x):
        self.register_buffer("last", x.mean())

    def count(self):
        return float(self.last) if "last" in self._buffers else 0


class InATable(Writer):
    def write(self, x):
        self._buffers["last"] = x.mean()

    def count(self):
        return float(self.last) if "last" in self._buffers else 0


@pytest.mark.parametrize("kind", [PastTheModule, OnAClass, Registered, InATable])
def test_what_a_forward_writes_is_written_by_runs_alone(kind, monkeypatch):
    monkeypatch.setattr(Numbers, "runs", 0)
    counts = []
    for convert in (lambda model: model, lambda model: normswap.convert(model, "cn")):
        Numbers.runs = 0
        model = convert(kind().eval())
        counts.append([model.count()])
        for _ in range(2):
            call(model, (images(),))
            counts[-1].append(model.count())
    assert counts[0] == counts[1]


def test_what_a_method_changes():
    class Counter(Block):
        def __init__(self):
            super().__init__()
            self.met = []

        def count(self):
            self.met.append(1)

        def forward(self, x):
            self.count()
            return super().forward(x) * len(self.met)

    model = Counter().eval()
    converted = normswap.convert(model, "cn", contexts=3, verify=False)
    for _ in range(2):
        close(call(converted, (images(),)), call(model, (images(),)))


def test_an_array_is_no_question():
    numpy = pytest.importorskip("numpy")
    table = numpy.ones(2)

    class Scaled(Block):
        def forward(self, x):
            return super().forward(x) * float(table[0])

    converted = normswap.convert(Scaled().eval(), "cn", contexts=3)
    before = call(converted, (images(),))
    table[0] = 2
    close(call(converted, (images(),)), [2 * before[0]])


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_traced_child_put_in_after_conversion():
    model = nn.Sequential(Block(), nn.Conv2d(CHANNELS, CHANNELS, 1)).eval()
    converted = normswap.convert(model, "cn", contexts=3)
    for changed in (model, converted):
        changed[1] = torch.jit.trace(changed[1], images())
    close(call(converted, (images(),), context=LABELS), call(model, (images(),)))
