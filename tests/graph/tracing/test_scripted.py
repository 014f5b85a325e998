"""Scripted functions in a forward: its module runs its own code."""

import pytest
import torch
from torch import nn

import normswap
from tests.support.behave import LABELS, close, images, separate

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]


def scaled(x, times: int):
    return x * times if bool(x.sum() > 0) else -x


class Net(nn.Module):
    """Calls a scripted function: of its globals, by another function, an attribute or a dict."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.how = how
        if how == "attribute":
            self.act = SCRIPTED["scaled"]

    def forward(self, x):
        x = self.norm(self.conv(x))
        if self.how == "global":
            return FUNCTION(x, 3)
        if self.how == "function":
            return by_function(x)
        if self.how == "method":
            return self.by_method(x)
        return self.act(x, 3) if self.how == "attribute" else SCRIPTED["scaled"](x, times=3)

    def by_method(self, x):
        return FUNCTION(x, times=3)


def by_function(x):
    return FUNCTION(x, 3)


SCRIPTED = {}


@pytest.fixture(autouse=True)
def _scripted():
    global FUNCTION
    FUNCTION = SCRIPTED["scaled"] = torch.jit.script(scaled)


@pytest.mark.parametrize("how", ["global", "function", "method", "attribute", "dict"])
def test_a_forward_may_call_a_scripted_function(how):
    model, x = Net(how).eval(), images()
    with torch.no_grad():
        expected = model(x)
        # A scripted function cannot be copied, so neither can who has one among its attributes.
        converted = normswap.convert(model, "cn", contexts=3, inplace=how == "attribute")
        close([converted(x, context=LABELS)], [expected])
        separate(converted)
        mixed = converted(x, context=LABELS)
        single = [
            converted.norm(converted.conv(x[i : i + 1]), context=LABELS[i : i + 1])
            for i in range(4)
        ]
    close([mixed], [scaled(torch.cat(single), 3)])


def test_the_summary_names_it():
    report = str(normswap.summary(normswap.convert(Net("global"), "cn", verify=False)))
    assert "own forward: (root): reads FUNCTION, a ScriptFunction outside of it" in report
