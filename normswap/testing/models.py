"""Small models, one for each way a label can travel from the batch to a norm."""

from typing import Any

import torch
from torch import Tensor, nn


def random_(tensor: Tensor, seed: int, low: float, high: float) -> Tensor:
    """Fill a tensor with uniform values, the same for each seed; return it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.copy_(low + (high - low) * values)
    return tensor


class ResidualBlock(nn.Module):
    """A block with one residual add."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Any:
        """Run it."""
        return x + self.bn(self.conv(x)).relu()


class ConvNet(nn.Module):
    """Norms on images, nested containers, a norm on vectors before the head."""

    shape = (3, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.blocks = nn.ModuleList([ResidualBlock(4), ResidualBlock(4)])
        self.neck = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Any:
        """Run it."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.neck(x.mean((2, 3))))


class Volume(nn.Module):
    """Norms on sequences and on volumes."""

    shape = (2, 3, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 4, 3, padding=1)
        self.bn3 = nn.BatchNorm3d(4)
        self.bn1 = nn.BatchNorm1d(4, affine=False)

    def forward(self, x: Tensor) -> Any:
        """Run it."""
        x = self.bn3(self.conv(x)).relu()
        return self.bn1(x.flatten(2)).mean(2)


class Windows(nn.Module):
    """Cuts each image in four windows, which a norm sees as samples."""

    shape = (3, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        """Run it."""
        x = self.embed(x).unflatten(2, (2, 2)).unflatten(4, (2, 2))
        windows = x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        windows = self.bn(windows.mean((2, 3)))
        return self.head(windows).unflatten(0, (-1, 4)).mean(1)


class Opaque(nn.Module):
    """Branches on values, so that no graph stands for its forward."""

    shape = (3, 5, 5)

    def __init__(self) -> None:
        super().__init__()
        self.inner = ResidualBlock(3)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Any:
        """Run it."""
        x = self.inner(x)
        if x.abs().mean() > 1e6:
            return x
        return self.bn(x).mean((2, 3))


class Instance(nn.Module):
    """Instance norms, with and without an affine."""

    shape = (3, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.first = nn.InstanceNorm2d(4, affine=True)
        self.second = nn.InstanceNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        """Run it."""
        x = self.first(self.conv(x)).relu()
        return self.second(x.square()).amax((2, 3))


class FrozenBatchNormAct2d(nn.Module):
    """Batch norm with every tensor a buffer that applies an activation, as timm's does."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.eps = 1e-5
        for seed, name in enumerate(("weight", "bias", "running_mean", "running_var")):
            low = -1 if name in ("bias", "running_mean") else 0.5
            self.register_buffer(name, random_(torch.empty(num_features), seed, low, 1.5))
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x: Tensor) -> Any:
        """Run it."""
        tensors = (self.running_mean, self.running_var, self.weight, self.bias)
        y = nn.functional.batch_norm(x, *tensors, eps=self.eps)  # type: ignore[arg-type]
        return self.act(self.drop(y))


class Frozen(nn.Module):
    """A norm of each kind of freezing, one with a fused activation."""

    shape = (3, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fused = FrozenBatchNormAct2d(4)
        self.first = nn.BatchNorm2d(4)
        self.second = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        """Run it."""
        return self.second(self.first(self.fused(self.conv(x))))


MODELS: dict[str, type[nn.Module]] = {
    cls.__name__: cls for cls in (ConvNet, Volume, Windows, Opaque, Instance)
}


def make_model(name: str = "ConvNet", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a model in eval mode, the same each time, every tensor of its norms random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = MODELS[name]()
    for seed, (key, tensor) in enumerate(model.state_dict().items()):
        if tensor.dim() == 1 and tensor.is_floating_point():
            low, high = (-1, 1) if key.endswith(("bias", "mean")) else (0.5, 2)
            random_(tensor, seed, low, high)
    return model.to(dtype).eval()


def make_inputs(model: nn.Module, samples: int = 6, seed: int = 0) -> Tensor:
    """Return inputs for a model of `MODELS`, in its dtype, the same each time."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    shape: Any = model.shape
    return torch.randn(samples, *shape, generator=generator, dtype=torch.float64).to(dtype)
