"""What a converted model must do whatever its forward looks like."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import normswap
from normswap.methods.layer import ContextLayer

CHANNELS = 4
LABELS = torch.tensor([0, 2, 1, 2])


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, CHANNELS, 6, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A convolution, a norm and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x))) + x


class Holder(nn.Module):
    """A module with two blocks, for a forward to use."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Block()
        self.b = Block()


class Both(Holder):
    def forward(self, x):
        return self.b(self.a(x))


class Own(Holder):
    """Keeps its own forward."""

    def forward(self, x):
        try:
            return self.b(self.a(x))
        except ZeroDivisionError:
            return x


def randomize(model: nn.Module) -> None:
    """Move statistics and affine of every norm away from where they start."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                if tensor is not None:
                    noise = torch.rand(tensor.shape, generator=generator) * 0.5
                    tensor.data.add_(noise)


def separate(model: nn.Module) -> None:
    """Give every context of every norm its own parameters."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, ContextLayer):
            for parameter in module.parameters(recurse=False):
                parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def tensors(output: Any) -> list[Tensor]:
    if hasattr(output, "__dataclass_fields__"):
        output = list(vars(output).values())
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def call(model: nn.Module, inputs: Any, **extra: Any) -> list[Tensor]:
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    with torch.no_grad():
        return tensors(model(*args, **kwargs, **extra))


def one(inputs: Any, index: int) -> Any:
    """Return sample `index` of arguments."""

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.shape[:1] == (4,):
            return leaf[index : index + 1]
        if hasattr(leaf, "__dataclass_fields__"):
            return type(leaf)(**{k: cut(v) for k, v in vars(leaf).items()})
        return leaf

    return tree_map(cut, inputs)


def close(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def check(model: nn.Module, *inputs: Any, opaque: str | None = None, **named: Any) -> nn.Module:
    """Convert; compare with the original, and mixed contexts with samples one by one.

    `opaque` is a part of the reason why the root keeps its own forward; None where it is traced.
    """
    given: Any = named or inputs or (images(),)
    randomize(model.eval())
    expected = call(model, given)
    converted = normswap.convert(model, "cn", contexts=3, verify=False)
    argument = type(converted)._normswap_argument
    close(call(converted, given, **{argument: LABELS}), expected)
    close(call(converted, given), expected)
    separate(converted)
    mixed = call(converted, given, **{argument: LABELS})
    single = [call(converted, one(given, i), **{argument: LABELS[i : i + 1]}) for i in range(4)]
    close(mixed, [torch.cat(parts) for parts in zip(*single, strict=True)])
    other = call(converted, given, **{argument: 1 - LABELS.clamp(max=1)})
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(mixed, other, strict=True))
    reasons = normswap.summary(converted).opaque
    if opaque is None:
        assert "" not in reasons, reasons
    else:
        assert opaque in reasons[""]
    return converted
