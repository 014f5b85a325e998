"""Channels of residual blocks are those that arrive there, or known not to be known."""

import pytest
import timm
import torch
from torch import nn

import normswap
from tests.support.sampling import crossed
from tests.support.scaling import Scale, scale_method

__all__ = ["scale_method"]


class Ghost(nn.Module):
    """Half of the channels by a convolution, half made from them; one too many is cut off."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels
        half = (channels + 1) // 2
        self.first = nn.Sequential(nn.Conv2d(channels, half, 1), nn.BatchNorm2d(half))
        self.cheap = nn.Conv2d(half, half, 1)

    def forward(self, x):
        x = self.first(x)
        return torch.cat([x, self.cheap(x)], dim=1)[:, : self.channels, :, :]


class GhostBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.ghost = Ghost(5)

    def forward(self, x):
        return x + self.ghost(x)


class Part(nn.Module):
    """Only the first channels have a skip."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5))

    def forward(self, x):
        y = self.conv(x)
        return torch.cat([y[:, 0:3] + x, y[:, 3:]], dim=1)


class Gated(nn.Module):
    """The gate has one channel, for every position."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.gate = nn.Conv2d(4, 1, 1)

    def forward(self, x):
        y = self.conv(x)
        return x + self.gate(y).sigmoid() * y


class Permuted(nn.Module):
    """A linear layer with channels last, and back."""

    def __init__(self, back=True):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 4)
        self.back = back

    def forward(self, x):
        y = self.linear(self.norm(x).permute(0, 2, 3, 1))
        return x + y.permute(0, 3, 1, 2)


class PermutedByName(Permuted):
    def forward(self, x):
        y = self.linear(self.norm(x).permute(dims=(0, 2, 3, 1)))
        return x + y.permute(dims=(0, 3, 1, 2))


class Glu(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv, self.glu = nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1), nn.GLU(1)

    def forward(self, x):
        return x + self.glu(self.conv(self.norm(x)))


class Unordered(nn.Module):
    """The layer defined first runs last; the skip is projected."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(6, 5, 1)
        self.first = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6))
        self.skip = nn.Conv2d(4, 5, 1)

    def forward(self, x):
        return self.skip(x) + self.last(self.first(x))


@pytest.mark.parametrize(
    ("block", "channels", "at_add"),
    [
        *[(GhostBlock, 5, 5), (Part, 3, 3), (Gated, 4, 4), (Permuted, 4, 4)],
        *[(PermutedByName, 4, 4), (Glu, 4, 4), (Unordered, 4, 5)],
    ],
)
@pytest.mark.parametrize("placement", ["pre", "residual", "identity", "post"])
def test_channels_are_those_that_arrive(block, channels, at_add, placement):
    at_add = channels if placement == "pre" else at_add
    model = normswap.convert(block().eval(), "scale", placement=placement)
    seen = []
    for module in model.modules():
        if isinstance(module, Scale):
            module.register_forward_pre_hook(
                lambda m, args: seen.append((m.place.channels, args[0].shape[1]))
            )
    model(torch.randn(2, channels, 6, 6))
    assert seen == [(at_add, at_add)]


class Tokens(nn.Module):
    """Added with channels last, after a reshape that does not say so."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.mix = nn.Linear(4, 4)

    def forward(self, x):
        n, c, h, w = x.shape
        x = self.norm(x).permute(0, 2, 3, 1)
        return x + self.mix(x.reshape(n, h * w, c)).reshape(n, h, w, c)


class Attention(nn.Module):
    """Logits are no features: their channels are heads or nothing."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.q, self.k = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.position = nn.Parameter(torch.zeros(16, 16))

    def forward(self, x):
        x = self.norm(x)
        q, k = self.q(x).flatten(2), self.k(x).flatten(2)
        logits = q.transpose(1, 2) @ k + q.transpose(1, 2) @ q
        return (logits + self.position).softmax(-1)


class Sequence(nn.Module):
    """(N, T, C): a convolution over T, between two transpositions."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4))

    def forward(self, x):
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


class Ways(nn.Module):
    """Where channels lie depends on the size of the input."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        if x.shape[1] == 4:
            return x + self.conv(x)
        return x + self.linear(x)


class Narrow(nn.Module):
    """One channel is added to all."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(4, 1, 1), nn.BatchNorm2d(1))

    def forward(self, x):
        return x + self.conv(x)


@pytest.mark.parametrize("placement", ["pre", "residual", "identity", "post"])
@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Tokens, "channels last|nothing tells"),
        (Attention, "nothing tells the channels|both operands"),
        (Sequence, "nothing tells"),
        (Ways, "branches on a value"),
        (Narrow, "nothing tells"),
    ],
)
def test_what_has_no_channels_in_dimension_1_gets_no_layer_and_a_reason(block, reason, placement):
    with pytest.raises(normswap.ConversionError, match=reason):
        normswap.plan(block(), "scale", placement=placement)


# SelfNorm has parameters for each channel, so a wrong count is an error at either end of a block.
PLACES = [("selfnorm", "pre"), ("selfnorm", "post"), ("crossnorm", "post")]


@pytest.mark.parametrize(
    ("name", "place"), crossed(["dla46x_c", "ghostnet_050", "rexnet_100"], PLACES)
)
def test_models_that_combine_and_hand_on_features(name, place):
    method, placement = place
    model, x = timm.create_model(name).eval(), torch.randn(2, 3, 64, 64)
    converted = normswap.convert(model, method, placement=placement)
    assert torch.equal(converted(x), model(x))
    converted.train()(x).sum().backward()


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_model_of_tokens_gets_no_layer(placement):
    with torch.device("meta"):
        model = timm.create_model("levit_128s")
    with pytest.raises(normswap.ConversionError, match=r"channels last|nothing tells"):
        normswap.convert(model, "selfnorm", placement=placement)
