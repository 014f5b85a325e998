"""convert, plan, summary, verify and use_context, on small models with known answers."""

import copy
import json
import re

import pytest
import torch
from torch import nn

import normswap
from normswap import ContextError, MissingContextError, VerificationError


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x):
        return x + self.bn(self.conv(x)).relu()


class Net(nn.Module):
    """A stem, two blocks and a head; every tensor of its norms is random."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4, momentum=0.3, eps=1e-3)
        self.blocks = nn.ModuleList([Block(4), Block(4)])
        self.layer_norm = nn.LayerNorm(4)
        self.num_classes = 5
        self.head = nn.Linear(4, 5)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                for name, tensor in module.state_dict().items():
                    if name != "num_batches_tracked":
                        tensor.uniform_(0.5, 1.5)

    def features(self, x):
        x = self.norm(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.layer_norm(x.mean((2, 3)))

    def forward(self, x):
        return self.head(self.features(x))


def images(n=6):
    return torch.randn(n, 3, 9, 9)


def scatter(model, scale=0.3):
    """Move every per-context tensor of a converted model by its own random amount."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, normswap.ContextNorm | normswap.ContextNormX):
                for tensor in layer.state_dict().values():
                    if tensor.is_floating_point() and tensor.dim() == 2:
                        tensor.add_(scale * torch.rand_like(tensor))
    return model


def test_one_context_by_default_needs_no_label_even_in_training():
    model = normswap.convert(Net().train())
    model(images()).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "mu" in n)


def test_class_attributes_and_other_keys_stay():
    net = Net()
    model = normswap.convert(net, "cn", contexts=3)
    assert isinstance(model, Net)
    assert type(model).__name__ == "Net"
    assert model.num_classes == 5
    assert set(net.state_dict()) <= set(model.state_dict())
    assert model.stem.weight.equal(net.stem.weight)


def test_the_original_is_not_touched_without_inplace():
    net = Net()
    before = copy.deepcopy(net.state_dict())
    normswap.convert(net, contexts=2, example_inputs=images())
    assert type(net) is Net
    assert isinstance(net.norm, nn.BatchNorm2d)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_inplace_returns_the_same_object_converted():
    net = Net()
    assert normswap.convert(net, inplace=True) is net
    assert isinstance(net.norm, normswap.ContextNormX)


def test_forward_keeps_its_signature_and_adds_context_last():
    import inspect

    parameters = inspect.signature(normswap.convert(Net()).forward).parameters
    assert list(parameters) == ["x", "context"]
    assert parameters["context"].default is None


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


def test_conversion_reports_the_largest_difference_for_every_context():
    model = normswap.convert(Net(), contexts=["a", "b", "c"], example_inputs=images(2))
    verification = normswap.summary(model).verification
    assert set(verification.differences) == {"unknown", "a", "b", "c"}
    assert verification.largest < 1e-5 * verification.scale


def test_verify_finds_a_context_that_computes_something_else():
    net = Net()
    model = normswap.convert(net, "cn", contexts=3, unknown="0")
    assert normswap.verify(model, net, images()).largest < 1e-5
    with torch.no_grad():
        model.norm.running_mean[2] += 1
    with pytest.raises(VerificationError, match="another function for context 2"):
        normswap.verify(model, net, images())


def test_verification_keeps_modes_and_the_generator():
    net = Net().train()
    net.blocks[0].eval()
    state = torch.get_rng_state()
    model = normswap.convert(net, example_inputs=images(2).clone())
    torch.set_rng_state(state)
    assert net.training
    assert model.training
    assert not model.blocks[0].bn.training
    assert int(net.norm.num_batches_tracked) == 0


def test_use_context_reaches_every_entry_and_nests():
    model = scatter(normswap.convert(Net().eval(), "cn", contexts=["a", "b"]))
    x, labels = images(), torch.tensor([0, 1, 1, 0, 0, 1])
    expected = model(x, context=labels)
    with normswap.use_context(model, labels):
        assert model(x).equal(expected)
        assert model.head(model.features(x)).equal(expected)
        with normswap.use_context(model, "b"):
            assert model(x).equal(model(x, context="b"))
        with normswap.use_context(model, None):
            unknown = model(x)
        assert model(x).equal(expected)
    assert model(x).equal(unknown)
    assert not unknown.equal(expected)


def test_use_context_ends_when_the_block_raises():
    model = scatter(normswap.convert(Net().eval(), "cn", contexts=2))
    x = images()
    unknown = model(x)
    with pytest.raises(RuntimeError), normswap.use_context(model, 1):
        raise RuntimeError
    assert model(x).equal(unknown)


def test_use_context_checks_the_labels_at_once():
    model = normswap.convert(Net(), contexts=2)
    with pytest.raises(ContextError, match=r"in \[0, 2\)"):
        with normswap.use_context(model, torch.tensor([2])):
            pass


def test_training_without_labels_names_the_argument_and_use_context():
    model = normswap.convert(Net().train(), contexts=2)
    with pytest.raises(MissingContextError, match=r"context=.*normswap\.use_context"):
        model(images())


def test_wrong_number_of_labels_names_the_first_norm():
    model = normswap.convert(Net(), contexts=2)
    with pytest.raises(
        ContextError, match=r"with 6 labels, one per sample, got 3 \(first norm: norm\)"
    ):
        model(images(), context=torch.zeros(3, dtype=torch.int64))


def test_one_label_in_a_tensor_is_not_the_whole_batch():
    model = normswap.convert(Net(), contexts=2)
    with pytest.raises(ContextError, match="with 6 labels, one per sample, got 1"):
        model(images(), context=torch.tensor([1]))
    model.eval()
    assert model(images(), context=torch.tensor(1)).shape == (6, 5)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, one, other):
        return self.net(one) + self.net(other)


def test_as_many_labels_as_arguments_is_not_a_batch():
    with pytest.raises(ContextError, match="with 6 labels, one per sample, got 2"):
        normswap.convert(Pair(), contexts=2)(images(), images(), context=torch.tensor([0, 1]))


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, images):
        return self.net(torch.stack(images))


def test_a_list_of_images_counts_as_the_batch():
    model = scatter(normswap.convert(Listed().eval(), "cn", contexts=2))
    x = images(2)
    labels = torch.tensor([0, 1])
    assert model(list(x), context=labels).equal(model.net(x, context=labels))


def test_priors_are_normalised_and_reported():
    report = normswap.plan(Net(), contexts=["a", "b"], priors=[3, 1])
    assert report.priors == (0.75, 0.25)


def test_priors_counted_from_labels():
    priors = normswap.contexts.count_priors(["a", "b", "b", None], ["a", "b"])
    assert priors.tolist() == pytest.approx([1 / 3, 2 / 3])


def test_a_bare_norm_becomes_a_layer():
    norm = nn.BatchNorm2d(3).eval()
    norm.running_mean.normal_()
    layer = normswap.convert(norm, "cn", contexts=2)
    x = torch.randn(2, 3, 4, 4)
    assert torch.allclose(layer(x, torch.tensor([0, 1])), norm(x), atol=1e-6)
    assert normswap.summary(layer).rows[0].fqn == ""
