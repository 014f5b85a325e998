"""`select="first"`: the one norm that a forward meets first."""

import pytest
import timm
import torch
from torch import nn

import normswap
from normswap.errors import ConversionError
from tests.support.nets import Net


class Backwards(nn.Module):
    """Its norms are registered in another order than they run in."""

    def __init__(self, way=None):
        super().__init__()
        self.last = nn.BatchNorm2d(3)
        self.stages = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))])
        self.way = way

    def forward(self, x):
        if self.way == "untraceable":
            print(end="")
        if self.way == "branch" and x.shape[-1] > 8:
            return self.last(x)
        return self.last(self.stages[0](x))


def replaced(model, method="cn", **settings):
    report = normswap.plan(model, method, select="first", **settings)
    return [(r.fqn, r.reason) for r in report.rows if r.action in ("replaced", "inserted")]


def test_order_of_the_forward_counts_not_of_registration():
    assert replaced(Backwards()) == [("stages.0.1", "the first that a forward meets")]


@pytest.mark.parametrize("way", ["untraceable", "branch"])
def test_where_no_graph_tells_the_reason_says_so(way):
    assert replaced(Backwards(way)) == [
        ("last", "the first in the model; the forward of Backwards could not be read")
    ]


@pytest.mark.parametrize(
    ("name", "first"),
    [("resnet18", "bn1"), ("densenet121", "features.norm0"), ("efficientnet_b0", "bn1")],
)
def test_models(name, first):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert [fqn for fqn, _ in replaced(model)] == [first]


def test_an_excluded_norm_is_not_the_first():
    assert replaced(Backwards(), exclude="stages*")[0][0] == "last"


def test_inserted_layers_follow_the_first_norm():
    assert replaced(Net(), "selfnorm", placement="norm") == [
        (replaced(Net())[0][0], "the first that a forward meets")
    ]


def test_a_module_of_that_name_is_an_error():
    model = nn.Sequential()
    model.add_module("first", nn.BatchNorm2d(3))
    with pytest.raises(ConversionError, match=r"select=\['first'\] for the module"):
        replaced(model)
    assert normswap.plan(model, "cn", select=["first"]).count(action="replaced") == 1


def test_the_preset_for_sensors():
    report = normswap.plan(Net(), "cn", preset="sensors", contexts=2)
    assert report.count(action="replaced") == 1
    assert "posterior" in str(report)
