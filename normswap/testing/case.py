"""A method under test: its models, labels and conversions, and how a check fails."""

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from normswap.api import convert, plan
from normswap.errors import ContractError, ConversionError
from normswap.lifecycle.record import method_layers
from normswap.methods.base import BaseMethod, InsertedMethod
from normswap.testing.models import MODELS, make_inputs, make_model, random_

NAMES = ("a", "b", "c")
PRIORS = (0.7, 0.2, 0.1)
LABELS = torch.tensor([2, 0, 1, 0, 1, 2])
MIXED = torch.tensor([2, 0, 1, 0, -1, 2])
# With a batch whose labels come in runs, one of a single context, and one that lacks a context.
ORDERS = [MIXED, *map(torch.tensor, ([0, 0, 1, 1, 2, 2], [1] * 6, [2, 2, 0, 0, 0, -1]))]

Labels: TypeAlias = Tensor | int | str | None


@dataclass(frozen=True)
class Case:
    """A method with some of its options, by name, and what checks do with it."""

    method: BaseMethod
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def labelled(self) -> bool:
        """Whether its models take labels."""
        return self.method.needs_context

    @property
    def labels(self) -> list[Labels]:
        """What may be given as context in eval mode."""
        return [0, 1, 2, LABELS, MIXED, None] if self.labelled else [None]

    @property
    def mixed(self) -> Tensor | None:
        """Labels of a batch, one of them unknown, where there are labels to give."""
        return MIXED if self.labelled else None

    @property
    def pooled(self) -> dict[str, str]:
        """Settings with which a sample without a label gets what "pooled" contexts compute."""
        return {"unknown": "pooled"} if self.labelled else {}

    @property
    def traces(self) -> tuple[bool, ...]:
        """Whether contexts are threaded through graphs, or in scope for own forwards."""
        return (True, False) if self.labelled else (True,)

    @property
    def models(self) -> list[str]:
        """Names of the models that have something the method can change, at least one."""
        refusals = _refusals(self)
        why = next(iter(refusals.values()))
        require(
            "" in refusals.values(), f"the method can change none of {', '.join(MODELS)}: {why}"
        )
        return [name for name, refusal in refusals.items() if not refusal]

    def refusal(self, base: nn.Module) -> str:
        """Return why the method can change nothing of a model, "" where it can."""
        try:
            plan(base, self.method.name, **dict(self.options))
        except ConversionError as error:
            return str(error)
        return ""

    def bases(self, dtype: torch.dtype = torch.float64) -> Iterator[tuple[nn.Module, Tensor]]:
        """Yield each model that fits, and inputs for it."""
        for name in self.models:
            base = make_model(name, dtype)
            yield base, make_inputs(base)

    def convert(self, base: nn.Module, **settings: Any) -> nn.Module:
        """Convert with three contexts of unequal priors, where the method takes contexts."""
        given = {"contexts": NAMES, "priors": PRIORS} if self.labelled else {}
        return convert(base, self.method.name, **{**given, **dict(self.options), **settings})

    def each_trained(self, names: Any = None) -> Iterator[tuple[str, nn.Module, Tensor]]:
        """Yield trained models, for graphs and for own forwards: what it is, the model, inputs."""
        for name in self.models if names is None else names:
            for trace in self.traces:
                model = self.trained(name, trace=trace)
                yield name if trace else f"{name}, trace=False", model, make_inputs(model)

    def trained(self, name: str = "ConvNet", **settings: Any) -> nn.Module:
        """Return a float64 model in eval mode, every tensor of the method's layers moved."""
        # What is said and what is left to its default is one model.
        return copy.deepcopy(_trained(self, name, tuple({"trace": True, **settings}.items())))

    def run(self, model: Callable[..., Any], x: Tensor, label: Labels = None) -> Tensor:
        """Call a model with a label, where there is one to give."""
        y: Tensor = model(x) if label is None else model(x, context=label)
        return y

    def in_eval(self, model: nn.Module, x: Tensor, label: Labels = None) -> Tensor:
        """Call a model in eval mode without gradients."""
        with torch.no_grad():
            return self.run(model.eval(), x, label)

    def given(self, label: Labels = LABELS) -> dict[str, Labels]:
        """Return the keyword arguments that carry labels."""
        return {"context": label} if self.labelled else {}


@functools.lru_cache(maxsize=32)
def _refusals(case: Case) -> dict[str, str]:
    return {name: case.refusal(make_model(name)) for name in MODELS}


@functools.lru_cache(maxsize=32)
def _trained(case: Case, name: str, settings: tuple[tuple[str, Any], ...]) -> nn.Module:
    base = make_model(name, torch.float64)
    model = move(case.convert(base, **dict(settings)))
    # What is measured here, which row is whose, every copy knows.
    case.in_eval(model, make_inputs(model), case.mixed)
    return model


def move(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every tensor of the method's layers by a random amount, as training might."""
    for layer in method_layers(model).values():
        for name, tensor in sorted(layer.state_dict().items()):
            if tensor.is_floating_point() and name != "priors":
                seed += 1
                with torch.no_grad():
                    tensor.add_(random_(torch.empty_like(tensor), seed, 0.1, 0.7))
    return model


def backward(y: Tensor) -> None:
    """Run backward from a number that every output is part of."""
    torch.autograd.backward(y.square().sum())


def require(holds: bool, message: str) -> None:
    """Raise a `ContractError` unless what a check asks for holds."""
    if not holds:
        raise ContractError(message)


def require_close(actual: Tensor, expected: Tensor, what: str, share: float = 1e-11) -> None:
    """Raise where values differ by more than a share of the largest expected one."""
    require(
        actual.shape == expected.shape,
        f"{what}: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}",
    )
    actual, expected = actual.detach().double(), expected.detach().double()
    bound = share * max(float(expected.abs().max()), 1.0) if expected.numel() else 0.0
    error = float((actual - expected).abs().max()) if expected.numel() else 0.0
    require(error <= bound, f"{what}: differ by {error:.3g}, allowed {bound:.3g}")


def require_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    """Raise where values differ in a bit."""
    require_close(actual, expected, what, 0.0)


def require_same_state(model: nn.Module, expected: dict[str, Tensor], what: str) -> None:
    """Raise where a state dict has other keys or values, to the bit."""
    found = model.state_dict()
    apart = sorted(found.keys() ^ expected.keys())
    require(not apart, f"{what}: state-dict keys on one side only: {', '.join(apart[:6])}")
    wrong = [name for name in found if not torch.equal(found[name], expected[name])]
    require(not wrong, f"{what}: other values in {', '.join(wrong[:6])}")


def require_raises(call: Callable[[], Any], error: type[Exception], what: str) -> None:
    """Raise unless a call raises an error of a class."""
    try:
        call()
    except error:
        return
    raise ContractError(f"{what}: expected {error.__name__}, got no error")


Applies: TypeAlias = Callable[[BaseMethod], bool]
CHECKS: dict[Callable[[Case], None], Applies] = {}


def check(applies: Applies = lambda method: True, **flags: bool) -> Callable[[Any], Any]:
    """Add a function to the contract of the methods it applies to that have these flags."""

    def add(function: Callable[[Case], None]) -> Callable[[Case], None]:
        CHECKS[function] = lambda method: (
            applies(method) and all(getattr(method, name) == flags[name] for name in flags)
        )
        return function

    return add


def replaces(method: BaseMethod) -> bool:
    """Return whether a method replaces norms."""
    return not isinstance(method, InsertedMethod)
