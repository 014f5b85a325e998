"""`plan`, `summary` and the selection of norms, on small models with known answers."""

import json
import re

import pytest
import torch
from torch import nn

import normswap
from tests.support.nets import Net


@pytest.mark.parametrize(
    ("select", "replaced"),
    [
        ("blocks.*", {"blocks.0.bn", "blocks.1.bn"}),
        (re.compile(r"\.1\."), {"blocks.1.bn"}),
        (nn.BatchNorm2d, {"norm", "blocks.0.bn", "blocks.1.bn"}),
        (
            lambda name, module: module.momentum == 0.3 if hasattr(module, "momentum") else 0,
            {"norm"},
        ),
        (["norm", re.compile("0")], {"norm", "blocks.0.bn"}),
    ],
)
def test_select_takes_globs_patterns_types_predicates_and_lists(select, replaced):
    report = normswap.plan(Net(), select=select)
    assert {row.fqn for row in report.rows if row.action == "replaced"} == replaced
    assert report.count(action="kept") == len(report.rows) - len(replaced)


def test_a_predicate_sees_the_modules_of_the_model_itself():
    net = Net()
    chosen = lambda name, module: module is net.blocks[1].bn  # noqa: E731
    assert normswap.plan(net, select=chosen).count(action="replaced") == 1
    model = normswap.convert(net, select=chosen)
    assert isinstance(model.blocks[1].bn, normswap.ContextNormX)
    assert isinstance(model.norm, nn.BatchNorm2d)


def test_exclude_wins_over_select():
    report = normswap.plan(Net(), select="blocks.*", exclude="*.1.bn")
    assert [row.fqn for row in report.rows if row.action == "replaced"] == ["blocks.0.bn"]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"select": ["norm", "block.*"]}, "select= to match one of norm, .*got 'block.*'"),
        ({"select": "blocks"}, r"not selected .*; for all inside of it write 'blocks\.\*'"),
        ({"exclude": "nrom"}, "exclude= to match one of norm, .*'nrom'; did you mean 'norm'"),
        ({"exclude": ["norm", "blocks"]}, r"got 'blocks'; for all inside of it write 'blocks\.\*'"),
        ({"exclude": re.compile("head")}, r"got re\.compile\('head'\)"),
        ({"method": "crossnorm", "placement": "norm", "exclude": "head*"}, "got 'head"),
    ],
)
def test_a_name_or_pattern_that_matches_nothing_is_refused(given, match):
    with pytest.raises(normswap.ConversionError, match=match):
        normswap.plan(Net(), **given)


def test_a_type_or_predicate_may_match_nothing():
    nothing = [nn.InstanceNorm2d, lambda name, module: False]
    assert normswap.plan(Net(), exclude=nothing).count(action="replaced") == 3


def test_plan_changes_nothing_and_says_what_convert_does():
    net = Net()
    planned = normswap.plan(net, "cn", contexts=["a", "b"])
    assert type(net) is Net
    done = normswap.summary(normswap.convert(net, "cn", contexts=["a", "b"]))
    for row in done.rows:
        row.divergence, row.rows = None, ""
    assert planned.rows == done.rows


def test_summary_counts_parameters_and_shows_every_norm():
    report = normswap.summary(normswap.convert(Net(), "cn-x", contexts=3))
    row = report.rows[0]
    assert (row.fqn, row.source, row.target) == ("norm", "BatchNorm2d", "ContextNormX")
    assert (row.parameters_before, row.parameters_after) == (8, 8 + 2 * 3 * 4)
    assert (row.channels, row.contexts, row.delivery) == (4, 3, "threaded")
    assert report.rows[-1].action == "refused"
    assert json.loads(json.dumps(report.to_dict()))["rows"][0]["fqn"] == "norm"
    assert report.records()[0]["target"] == "ContextNormX"
    assert "| norm" in report.markdown()
    assert "4 norm" not in str(report)
    assert "... and 3 more" in report.text(most=1)


def test_summary_of_a_wrapper_finds_the_converted_model_inside():
    task = nn.ModuleDict({"backbone": normswap.convert(Net())})
    assert normswap.summary(task).model == "Net"


def test_divergence_is_zero_at_conversion_and_the_gaussian_formula_after():
    model = normswap.convert(Net(), "cn-x", contexts=2)
    assert normswap.summary(model).rows[0].divergence == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        model.norm.mu.copy_(torch.tensor([[1.0], [-1.0]]).expand(2, 4))
        model.norm.log_sigma.zero_()
    # Two unit Gaussians at +-1: pooled variance 2, KL = (log 2 + (1 + 1) / 2 - 1) / 2 each.
    expected = 0.5 * torch.log(torch.tensor(2.0)).item()
    assert normswap.summary(model).rows[0].divergence == pytest.approx(expected, rel=1e-5)


def test_priors_are_normalised_and_reported():
    report = normswap.plan(Net(), contexts=["a", "b"], priors=[3, 1])
    assert report.priors == (0.75, 0.25)


def test_priors_counted_from_labels():
    priors = normswap.contexts.count_priors(["a", "b", "b", None], ["a", "b"])
    assert priors.tolist() == pytest.approx([1 / 3, 2 / 3])


def test_summary_counts_what_is_trained():
    model = normswap.convert(Net(), "cn", contexts=3)
    assert (report := normswap.summary(model)).trainable == report.parameters
    normswap.freeze(model, "contexts")
    assert (report := normswap.summary(model)).trainable == 3 * 2 * 3 * 4  # norms, tables, K, C
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert f"trainable parameters: 72 of {report.parameters:,}" in str(report)


def test_a_notebook_gets_a_table_with_names_escaped():
    class Angles(nn.Sequential):
        pass

    model = Angles()
    model.add_module("<b>", nn.BatchNorm2d(3))
    shown = normswap.plan(model, "cn", contexts=["<i>", "x&y"])._repr_html_()
    assert "&lt;i&gt;, x&amp;y" in shown
    assert re.search(r"<td>&lt;b&gt;\s*</td>", shown)
    assert shown.count("<tr>") == 2
    assert "<b>" not in shown
    assert "<i>" not in shown
