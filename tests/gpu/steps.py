"""A training step or a forward on two devices: the same numbers in, what comes out compared."""

import copy
import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import normswap
from normswap.methods.base import BaseMethod, get_method
from normswap.testing.case import Case

DEVICE = "NORMSWAP_TEST_DEVICE"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
METHODS = normswap.methods()
LABELLED = [name for name in METHODS if get_method(name).needs_context]
EVERY = pytest.mark.parametrize("method", METHODS)
EVERY_LABELLED = pytest.mark.parametrize("method", LABELLED)
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])

# A sort breaks ties, and hands gradients on by rank: a rounding moves some of them elsewhere.
SORTED = ("efdmix",)

Values = dict[str, Tensor]


def case_of(method: str) -> Case:
    return Case(get_method(method))


def options_of(method: BaseMethod) -> dict[str, Any]:
    """Return the options with which a method that draws does something in every forward."""
    names = {field.name for field in dataclasses.fields(method.options)}
    return {"p": 1.0} if "p" in names else {}


class HostDraws(TorchFunctionMode):
    """Random numbers are drawn on the CPU in float32 and then moved, so that devices agree."""

    drawing = (torch.rand, torch.randn, torch.randint, torch.randperm)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in self.drawing:
            device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
            drawn = func(*args, **kwargs, device="cpu")
            return drawn.to(device or "cpu", dtype or drawn.dtype)
        if func is torch._standard_gamma:
            return func(args[0].cpu(), **kwargs).to(args[0].device)
        return func(*args, **kwargs)


def labels_for(samples: int, pattern: Tensor) -> Tensor:
    return pattern.repeat(-(-samples // len(pattern)))[:samples]


def widen(model: nn.Module) -> nn.Module:
    """Return a copy in float64 on the CPU, its values those of float32."""
    return copy.deepcopy(model).float().double()


def values_of(
    model: nn.Module,
    x: Tensor,
    labels: Any,
    training: bool,
    autocast: torch.dtype | None = None,
    scale: float = 1.0,
    compiled: Callable[..., Tensor] | None = None,
) -> Values:
    """Return the output, every gradient and every buffer after it, in float64 on the CPU.

    Args:
        model: is changed, as a step of training does.
        x: input, on the model's device.
        labels: given as context=, None not at all.
        training: the mode.
        autocast: the dtype of autocast, if any.
        scale: of the loss; gradients are divided by it, as a scaler does.
        compiled: is called in the model's place.
    """
    torch.manual_seed(0)
    model.train(training).zero_grad()
    x = x.detach().requires_grad_()
    given = {} if labels is None else {"context": labels}
    mode = torch.autocast(x.device.type, autocast) if autocast else nullcontext()
    run = model if compiled is None else compiled
    with HostDraws() if compiled is None else nullcontext(), mode:
        y = run(x, **given)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(scale * cotangent.to(y.device, y.dtype))
    found = {"output": y, "gradient of the input": x.grad / scale}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad / scale
    found |= {f"buffer {n}": b for n, b in model.named_buffers() if b.is_floating_point()}
    return {name: value.detach().cpu().double() for name, value in found.items()}


def errors(found: Values, expected: Values) -> dict[str, float]:
    """Return the relative error of each tensor, in the Euclidean norm.

    A tensor is judged by a hundredth of the largest of its kind, if it is smaller: the gradient of
    a bias before a norm is zero but for rounding.
    """
    assert found.keys() == expected.keys()
    kinds: dict[str, float] = {}
    for name, value in expected.items():
        kinds[name.split()[0]] = max(float(value.norm()), kinds.get(name.split()[0], 0.0))
    apart = {}
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        size = max(float(value.norm()), 0.01 * kinds[name.split()[0]], 1e-12)
        apart[name] = float((found[name] - value).norm()) / size
    return apart


def without_gradients(values: Values) -> Values:
    return {name: value for name, value in values.items() if not name.startswith("gradient")}


def require_near(found: Values, expected: Values, share: float) -> None:
    """Fail where a tensor is off by more than a share, or is not finite; name the worst."""
    apart = errors(found, expected)
    wrong = {name: error for name, error in apart.items() if not error <= share}
    worst = sorted(wrong, key=lambda name: -wrong[name])[:5]
    said = "; ".join(f"{name}: {wrong[name]:.2g}" for name in worst)
    assert not wrong, f"{len(wrong)} of {len(apart)} tensors differ by over {share:.2g}: {said}"
