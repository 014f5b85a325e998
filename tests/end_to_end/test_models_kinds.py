"""Kinds of models beyond image classifiers, written out small."""

import pytest
import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

import normswap
from tests.support.behave import LABELS, Block, Holder, call, check, close, images, separate


def threaded(converted):
    report = normswap.summary(converted)
    assert not report.opaque
    assert report.count(delivery="threaded") == len(report.rows)


class Backbone(nn.Sequential):
    def __init__(self):
        super().__init__(Block(), nn.AvgPool2d(2), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Siamese(nn.Module):
    """One backbone on two inputs, one after the other or side by side."""

    def __init__(self, together):
        super().__init__()
        self.backbone, self.head, self.together = Backbone(), nn.Linear(8, 2), together

    def forward(self, one, other):
        if self.together:
            pair = self.backbone(torch.cat([one, other])).chunk(2)
        else:
            pair = self.backbone(one), self.backbone(other)
        return self.head(torch.cat([pair[0], pair[1] - pair[0]], 1))


@pytest.mark.parametrize("together", [False, True])
def test_one_backbone_on_two_inputs(together):
    threaded(check(Siamese(together), images(), images().flip(0) * 2))


class Detect(nn.Module):
    """Refines the list of features it is given, and returns it inside its output."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([Block(), Block()])

    def forward(self, features):
        for i, head in enumerate(self.heads):
            features[i] = head(features[i])
        return {"boxes": sum(f.mean((2, 3)) for f in features), "features": features}


class Detector(Holder):
    def __init__(self, more):
        super().__init__()
        self.detect, self.more = Detect(), more

    def forward(self, x):
        features = [self.a(x), self.b(x)]
        found = self.detect(features)
        if self.more:
            found["features"].append(x)
            found["boxes"] = found["boxes"] * len(features) + self.a(features[0]).mean((2, 3))
        return found


@pytest.mark.parametrize("more", [False, True])
def test_a_detector_that_returns_its_features_inside_its_output(more):
    check(Detector(more), opaque="hands a list or dict to a Detect that may change it")


class UNet3d(nn.Module):
    def __init__(self):
        super().__init__()

        def level(inner, outer):
            return nn.Sequential(
                nn.Conv3d(inner, outer, 3, padding=1),
                nn.InstanceNorm3d(outer, affine=True),
                nn.LeakyReLU(inplace=True),
            )

        self.down = nn.ModuleList([level(1, 4), level(4, 8)])
        self.bottom = level(8, 8)
        self.up = nn.ModuleList([nn.ConvTranspose3d(8, 8, 2, 2), nn.ConvTranspose3d(8, 4, 2, 2)])
        self.join = nn.ModuleList([level(16, 8), level(8, 4)])

    def forward(self, volume):
        skips = []
        for level in self.down:
            volume = level(volume)
            skips.append(volume)
            volume = nn.functional.max_pool3d(volume, 2)
        volume = self.bottom(volume)
        for up, join in zip(self.up, self.join, strict=True):
            volume = join(torch.cat([up(volume), skips.pop()], 1))
        return {"mask": volume, "score": volume.mean((1, 2, 3, 4))}


def test_an_encoder_and_decoder_on_volumes():
    threaded(check(UNet3d(), torch.randn(4, 1, 8, 8, 8)))


class PointNet(nn.Module):
    """Norms on points (N, C, P) and on vectors (N, C), an alignment of the input."""

    def __init__(self):
        super().__init__()
        self.align = nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.ReLU())
        self.matrix = nn.Linear(8, 9)
        self.features = nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))

    def forward(self, points):
        matrix = self.matrix(self.align(points).amax(2)).view(-1, 3, 3) + torch.eye(3)
        return self.head(self.features(torch.bmm(matrix, points)).amax(2)), matrix


def test_points():
    check(PointNet(), torch.randn(4, 3, 20), opaque="calls eye() of nothing that it is given")


class Waves(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList()
        for dilation in (1, 2):
            conv = nn.Conv1d(4, 4, 3, padding=dilation, dilation=dilation)
            self.blocks.append(nn.Sequential(conv, nn.BatchNorm1d(4), nn.PReLU()))

    def forward(self, waves, lengths=None, *, scale: float = 1.0):
        for block in self.blocks:
            waves = waves + block(waves) * scale
        if lengths is not None:
            waves = waves * (torch.arange(waves.shape[2]) < lengths[:, None, None])
        return waves


def test_waves_with_optional_and_keyword_arguments():
    waves = torch.randn(4, 4, 16)
    threaded(check(Waves(), waves))
    threaded(check(Waves(), waves=waves, lengths=torch.tensor([3, 9, 16, 7]), scale=0.5))


def test_a_generator():
    up = nn.ConvTranspose2d(4, 4, 4, 2, 1)
    first, last = nn.InstanceNorm2d(4, affine=True), nn.InstanceNorm2d(4)
    net = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3), first, Block(), up, last)
    threaded(check(nn.Sequential(*net, nn.Tanh())))


class Recurrent(Holder):
    """The same norms at each step, tied to another name."""

    def __init__(self):
        super().__init__()
        self.again = self.a
        self.b.conv.weight = self.a.conv.weight

    def forward(self, x):
        state = torch.zeros_like(x)
        for _ in range(3):
            state = torch.tanh(self.a(x + state)) + self.again(state)
        return self.b(state)


def test_recurrent_use_of_tied_blocks():
    converted = check(Recurrent())
    threaded(converted)
    assert converted.again is converted.a
    assert converted.b.conv.weight is converted.a.conv.weight


class Checkpointed(Holder):
    def __init__(self):
        super().__init__()
        self.checkpointing = False

    def forward(self, x):
        for block in (self.a, self.b):
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return x


@pytest.mark.parametrize("before", [True, False])
def test_checkpointing_turned_on_before_and_after_conversion(before):
    model = Checkpointed()
    model.checkpointing = before
    opaque = "calls torch.utils.checkpoint.checkpoint()" if before else None
    converted = check(model, opaque=opaque).train()
    gradients = []
    for on in (True, False):
        converted.checkpointing = on
        converted.zero_grad()
        converted(images(), context=LABELS).square().sum().backward()
        gradients.append([p.grad.clone() for p in converted.parameters() if p.grad is not None])
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right)


def test_a_bare_norm():
    norm = nn.BatchNorm2d(4).eval()
    converted = normswap.convert(norm, "cn", contexts=3)
    close(call(converted, (images(),), context=LABELS), call(norm, (images(),)))
    separate(converted)
    mixed = converted(images(), context=LABELS)
    alone = [converted(images()[i : i + 1], context=LABELS[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(mixed, torch.cat(alone))


def test_a_traced_model_is_refused_by_name():
    with pytest.raises(normswap.ConversionError, match=r"traced graph .*convert the module it was"):
        normswap.convert(fx.symbolic_trace(Checkpointed().eval()))


class Chunks(Holder):
    """Takes features apart as CSP blocks do."""

    def forward(self, x):
        parts = list(self.a(x).chunk(2, 1))
        parts.extend(self.b(x).split((1, 3), dim=1))
        height, width = map(int, x.shape[-2:])
        y = torch.cat(parts, 1)[:, ::2]
        return self.b(y.reshape(*x.shape[:2], height, width)) / height


def test_features_taken_apart():
    check(Chunks(), opaque="loops over, or takes apart, a value")


def test_features_with_fewer_parts_than_asked_for():
    model = Chunks().eval()
    converted = normswap.convert(model, "cn", contexts=3, verify=False)
    for changed in (model, converted):
        changed.a.register_forward_hook(lambda module, args, output: output[:, :1])
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            changed(images())
