"""While one thread traces, another that runs code of the same module is answered as before."""

import threading
import types

import pytest
import torch
from torch import nn

import normswap
from normswap.graph.tracing.tracer import ContainerTracer
from tests.support.builders import trained_norm


class Settings:
    pass


class Asks(nn.Module):
    """Runs its own forward, which asks something, and its norm if the answer is yes."""

    def __init__(self, question):
        super().__init__()
        self.norm, self.settings, self.seen = trained_norm(), Settings(), []
        self.question = question

    def forward(self, x):
        self.seen.append(x)  # what no graph stands for
        self.seen.clear()
        return self.norm(x) if QUESTIONS[self.question](self) else x


class Traced(nn.Module):
    """Has a function of this file entered, with what stands in for builtins in its globals."""

    def __init__(self):
        super().__init__()
        self.norm = trained_norm()

    def forward(self, x):
        return self.norm(x) if isinstance(self.norm, nn.BatchNorm2d) else x


def has_setting(module):
    return not hasattr(module.settings, "size")


def default_setting(module):
    return getattr(module.settings, "size", True)


def of_class(module):
    return getattr(Settings, "size", True)


def goes_by_type(module):
    kind = type(module)
    return kind.__name__ == type(module.settings).__name__ or kind is not None


def number(module):
    return type(len(module.seen)) is int


QUESTIONS = {
    "isinstance": lambda module: isinstance(module.norm, nn.BatchNorm2d),
    "class": lambda module: issubclass(module.norm.__class__, nn.BatchNorm2d),
    "hasattr": has_setting,
    "getattr": default_setting,
    "getattr of a class": of_class,
    "type": goes_by_type,
    "type of a number": number,
    "isinstance of a number": lambda module: isinstance(len(module.seen), int),
    "modes": lambda module: torch.is_grad_enabled() or not torch.is_grad_enabled(),
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("beside", ["converted", "original"])
@pytest.mark.parametrize("where", ["this file", "another"])
def test_a_thread_beside_a_trace_gets_its_own_answers(question, beside, where, monkeypatch):
    torch.manual_seed(0)
    original = Asks(question).eval()
    x = torch.randn(3, 4, 5, 5)
    expected = original(x)
    assert not torch.equal(expected, x)
    model = original
    if beside == "converted":
        model = normswap.convert(original, "cn", contexts=2).eval()
        torch.testing.assert_close(model(x, context=1), expected)
    results = []

    def run():
        try:
            results.append(model(x) if beside == "original" else model(x, context=1))
        except Exception as error:
            results.append(error)

    call = ContainerTracer.call

    def with_thread(tracer, module, args, kwargs):
        thread = threading.Thread(target=run)
        thread.start(), thread.join()
        return call(tracer, module, args, kwargs)

    # As code of the library, which the trace does not judge.
    ours = types.FunctionType(
        with_thread.__code__, {**globals(), "__name__": "torch"}, closure=with_thread.__closure__
    )
    other = Traced() if where == "this file" else nn.Sequential(trained_norm())
    monkeypatch.setattr(ContainerTracer, "call", ours)
    normswap.convert(other, "cn", contexts=2, verify=False)
    assert results
    for result in results:
        torch.testing.assert_close(result, expected)
