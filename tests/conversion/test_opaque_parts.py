"""Parts without norms may be scripted, traced or compiled, and stay so; others are refused."""

import copy
import warnings

import pytest
import torch
from torch import nn

import normswap
from normswap import ConversionError
from tests.support.builders import trained_norm


class Rectified(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.conv(x).relu()


class Normed(Rectified):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x))


def quietly(make):
    def made(part):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer releases of torch warn that it is deprecated
            return make(part)

    return made


def compiled_in_place(part):
    part.compile(backend="eager")
    return part


KINDS = {
    "scripted": quietly(torch.jit.script),
    "traced by jit": quietly(lambda part: torch.jit.trace(part.eval(), torch.ones(2, 4, 4, 4))),
    "traced by fx": torch.fx.symbolic_trace,
    "exported": lambda part: torch.export.export(part.eval(), (torch.ones(5, 4, 4, 4),)).module(),
    "compiled": lambda part: torch.compile(part, backend="eager"),
    "compiled in place": compiled_in_place,
}


# What torch exports refuses train() and eval(), so that no model holds it in training.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "exported"])
@torch.no_grad()
def test_a_part_without_norms_stays_as_it_is(kind):
    torch.manual_seed(0)
    base = nn.Sequential(trained_norm(), KINDS[kind](Rectified()), nn.BatchNorm2d(4)).eval()
    images, labels = torch.randn(5, 4, 4, 4), torch.tensor([0, 1, 1, 0, 1])
    expected = base(images)
    inplace = "compiled" in kind  # torch's compiled module refers to the original, in a copy too
    model = normswap.convert(base, "cn", contexts=2, inplace=inplace)
    torch.testing.assert_close(model(images, context=labels), expected)
    model[0].weight[1] *= 2
    mixed = model(images, context=labels)
    for row, label in enumerate(labels):
        alone = images[row : row + 1].expand(5, -1, -1, -1)  # an exported part takes five
        torch.testing.assert_close(mixed[row], model(alone, context=label.repeat(5))[row])
    assert not torch.equal(mixed, expected)
    torch.testing.assert_close(copy.deepcopy(model)(images, context=labels), mixed)
    reverted = normswap.revert(model, "0", inplace=inplace)
    torch.testing.assert_close(reverted(images), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_with_norms_is_refused(kind):
    base = nn.Sequential(trained_norm(), KINDS[kind](Normed()))
    with pytest.raises(ConversionError, match=r"its submodule 1 .* (scripted|compiled|traced)"):
        normswap.convert(base, "cn", contexts=2, inplace=True)
