"""What `convert` warns of."""

import warnings

import pytest
from torch import nn

import normswap
from normswap.cli.main import main
from normswap.errors import AdviceWarning
from normswap.testing import method_checks
from tests.support.builders import trained_norm

INSERTED = ["selfnorm", "crossnorm", "cnsn", "mixstyle", "efdmix", "dsu"]


def net(trained):
    make = (lambda: trained_norm()) if trained else (lambda: nn.BatchNorm2d(4))
    return nn.Sequential(make(), nn.Conv2d(4, 4, 1), make())


@pytest.mark.parametrize(
    ("method", "trained", "settings", "words"),
    [
        ("cn-x", False, {}, "never trained"),
        ("cn", True, {}, "frozen"),
        ("acn", True, {}, "frozen"),
        ("cn-x", True, {"statistics": "batch"}, "frozen"),
        # What stays as it was takes statistics of the batch, too.
        ("cn-x", True, {"select": "first"}, "frozen"),
        ("cn-x", True, {"placement": "input"}, "frozen"),
        *((name, True, {"placement": "norm"}, "frozen") for name in INSERTED),
    ],
)
def test_another_conversion_is_advised(method, trained, settings, words):
    with pytest.warns(AdviceWarning, match=words):
        normswap.convert(net(trained), method, **settings)


@pytest.mark.parametrize(
    ("method", "trained", "settings"),
    [
        ("cn-x", True, {}),
        ("cn-x", False, {"statistics": "batch"}),
        ("cn-x", False, {"select": "first"}),
        ("cn", False, {}),
        ("acn", True, {"statistics": "learned"}),
        ("acn", False, {}),
        ("cn", False, {"placement": "input"}),
        *((name, False, {"placement": "norm"}) for name in INSERTED),
    ],
)
def test_nothing_is_said_where_nothing_is_better(method, trained, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdviceWarning)
        normswap.convert(net(trained), method, **settings)


@pytest.mark.parametrize("name", ["verify", "check"])
def test_models_with_values_by_chance_are_advised_nothing(name, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdviceWarning)
        if name == "verify":
            assert main(["verify", "test_resnet", "--method", "selfnorm"]) == 0
        else:
            checks = {check.name: check for check in method_checks("crossnorm")}
            checks["function_is_kept"]()
