"""Freezing of parameters and of statistics."""

import copy
import pickle
import re

import pytest
import timm
import timm.optim
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import normswap
from tests.support.models import ConvNet
from tests.support.training import convert, takes_context

TABLES = {
    "cn": {"weight", "bias"},
    "cn-x": {"mu", "log_sigma"},
    "acn": {"prior_logits", "mu", "log_sigma"},
}


@pytest.mark.parametrize("method", sorted(TABLES))
def test_freeze_contexts_trains_the_tables_alone(method):
    model = convert(ConvNet(), method)
    normswap.freeze(model, train="contexts")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.rpartition(".")[2] for n in trained} == TABLES[method]
    assert {n.rpartition(".")[0] for n in trained} == {
        "stem.1",
        "blocks.0.bn",
        "blocks.1.bn",
        "neck",
    }


def test_freeze_norms_trains_replaced_inserted_and_remaining_norms():
    model = convert(ConvNet(), "selfnorm")
    model.head = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 5))
    normswap.freeze(model, train="norms")
    kept = {n for n, p in model.named_parameters() if not p.requires_grad}
    convs = {
        f"{n}.{p}"
        for n in ("stem.0", "blocks.0.conv", "blocks.1.conv", "head.1")
        for p in ("weight", "bias")
    }
    assert kept == convs
    replaced = convert(ConvNet(), "cn-x")
    normswap.freeze(replaced)
    assert replaced.neck.mu.requires_grad
    assert replaced.neck.weight.requires_grad
    assert not replaced.head.weight.requires_grad


def test_freeze_all_takes_it_back():
    model = convert(ConvNet(), "cn")
    normswap.freeze(model, train="contexts", stats="frozen")
    normswap.freeze(model, train="all", stats="update")
    assert all(p.requires_grad for p in model.parameters())
    x, labels = torch.randn(4, 3, 6, 6), torch.tensor([0, 0, 1, 1])
    before = model.neck.running_mean.clone()
    model.train()(x, context=labels)
    assert not torch.equal(model.neck.running_mean, before)


class Mixed(nn.Module):
    """A norm that is converted, and others with running statistics that are not."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.first = nn.BatchNorm2d(4)
        self.plain = nn.BatchNorm2d(4)
        self.fused = timm.layers.BatchNormAct2d(4, drop_layer=nn.Dropout)
        self.instance = nn.InstanceNorm2d(4, track_running_stats=True)

    def forward(self, x):
        return self.instance(self.fused(self.plain(self.first(self.conv(x)))))


def mixed(method="cn"):
    model = convert(Mixed(), method, select=["first"])
    for name, buffer in model.named_buffers():
        if "running" in name:
            nn.init.uniform_(buffer, 0.5, 1.5)
    return model


def run(model, x):
    labels = torch.tensor([0, 1, 2, 2])
    return model(x, labels) if takes_context(normswap.summary(model).method) else model(x)


@pytest.mark.parametrize("way", ["itself", "deepcopy", "pickle"])
@pytest.mark.parametrize("method", ["cn", "acn", "selfnorm"])
def test_frozen_statistics_are_used_and_kept_in_training(method, way):
    model = mixed(method)
    model.fused.drop.p = 0.0
    normswap.freeze(model, train="all", stats="frozen")
    if way != "itself":
        model = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    x = torch.randn(4, 3, 6, 6)
    expected = run(model.eval(), x)
    before = copy.deepcopy(model.state_dict())
    model.train()
    model.zero_grad()
    y = run(model, x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    assert model.conv.weight.grad is not None
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_frozen_statistics_leave_dropout_to_the_mode():
    model = mixed()
    normswap.freeze(model, train="all", stats="frozen")
    model.train()
    assert model.fused.drop.training
    assert not model.fused.training
    model.eval()
    assert not model.fused.drop.training
    model.train()
    normswap.freeze(model, train="all", stats="update")
    assert model.fused.training
    assert model.plain.training
    assert "train" not in vars(model.plain)
    model.eval()
    assert not model.plain.training


def test_freezing_twice_can_be_taken_back_in_one_go():
    model = mixed().train()
    for _ in range(2):
        normswap.freeze(model, stats="frozen")
    normswap.freeze(model, train="all")
    assert model.plain.training
    assert not model.first.stats_frozen


def test_frozen_statistics_still_need_labels_in_training():
    model = mixed()
    normswap.freeze(model, stats="frozen")
    with pytest.raises(normswap.MissingContextError):
        model.train()(torch.randn(2, 3, 6, 6))


def test_a_compiled_model_notices_freezing():
    model = convert(nn.Sequential(nn.BatchNorm2d(3)), "cn").train()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, labels = torch.randn(4, 3, 6, 6), torch.tensor([0, 0, 1, 1])
    run(x, context=labels)
    normswap.freeze(model, stats="frozen")
    before = model[0].running_mean.clone()
    torch.testing.assert_close(run(x, context=labels), model(x, context=labels))
    assert torch.equal(model[0].running_mean, before)


def test_layers_of_a_frozen_batch_norm_never_move():
    from torchvision.ops import FrozenBatchNorm2d

    model = convert(nn.Sequential(FrozenBatchNorm2d(3)), "cn").train()
    normswap.freeze(model, train="all", stats="update")
    before = model[0].running_mean.clone()
    model(torch.randn(4, 3, 6, 6), context=torch.tensor([0, 0, 1, 1]))
    assert torch.equal(model[0].running_mean, before)


@pytest.mark.parametrize(
    ("also", "modules"),
    [
        ("head", {"head"}),
        ("blocks.*.conv", {"blocks.0.conv", "blocks.1.conv"}),
        (["head", re.compile(r"^stem$")], {"head", "stem.0"}),
        (nn.Linear, {"head"}),
        (lambda name, module: name == "head", {"head"}),
    ],
)
def test_freeze_trains_also_what_is_named(also, modules):
    model = convert(ConvNet(), "cn")
    normswap.freeze(model, train="contexts", also=also)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    tables = {"stem.1", "blocks.0.bn", "blocks.1.bn", "neck"}
    assert {n.rpartition(".")[0] for n in trained} == tables | modules


def test_freeze_finds_also_a_shared_module_by_its_second_name():
    model = convert(ConvNet(), "cn")
    model.second = model.head
    normswap.freeze(model, also="second")
    assert model.head.weight.requires_grad


@pytest.mark.parametrize("also", ["", ["head", ""]])
def test_freeze_refuses_the_empty_name_which_is_the_model(also):
    model = normswap.convert(ConvNet(), "cn", contexts=2)
    with pytest.raises(normswap.ConversionError, match="expected also= to name parts"):
        normswap.freeze(model, also=also)


@pytest.mark.parametrize("also", ["haed", ["neck", "haed"]])
def test_freeze_refuses_a_name_that_matches_nothing(also):
    model = convert(ConvNet(), "cn")
    match = "expected also= to match a module of ConvNet, got 'haed'; did you mean 'head'"
    with pytest.raises(normswap.ConversionError, match=match):
        normswap.freeze(model, also=also)
    assert all(p.requires_grad for p in model.parameters())


def test_freeze_refuses_what_it_does_not_know():
    model = convert(ConvNet(), "cn")
    with pytest.raises(normswap.UnknownNameError, match="the choices are norms, contexts, all"):
        normswap.freeze(model, train="heads")
    with pytest.raises(normswap.UnknownNameError, match="the choices are update, frozen"):
        normswap.freeze(model, stats="eval")
    with pytest.raises(normswap.ConversionError, match=r"normswap\.convert first"):
        normswap.freeze(ConvNet())
    with pytest.raises(normswap.ConversionError, match="nothing to train with train='contexts'"):
        normswap.freeze(convert(ConvNet(), "selfnorm"), train="contexts")
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    with pytest.raises(normswap.ConversionError, match="before DistributedDataParallel"):
        normswap.freeze(wrapped)


@pytest.mark.parametrize("back", [normswap.revert, normswap.specialize])
def test_a_plain_model_has_no_held_norms(back):
    model = convert(ConvNet(), "cn", select="stem*").train()
    normswap.freeze(model, "all", "frozen")
    assert not model.neck.training
    plain = back(model, 0)
    assert all(m.training for m in plain.modules())
    assert "train" not in vars(plain.neck)
    assert not any("normswap" in name for m in plain.modules() for name in vars(m))
    assert not model.neck.training


def test_a_held_norm_goes_back_to_its_mode_after_a_pass_in_eval_mode():
    model = convert(ConvNet(), "cn", select="stem*").train()
    normswap.freeze(model, "all", "frozen")
    normswap.adapt(model, [torch.randn(8, 3, 8, 8)], 0, progress=False)
    normswap.freeze(model, "all", "update")
    assert all(m.training for m in model.modules())


def test_also_without_parameters_is_refused():
    model = normswap.convert(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), "cn-x", contexts=2
    )
    with pytest.raises(normswap.ConversionError, match="also= of modules with parameters"):
        normswap.freeze(model, "norms", also=nn.ReLU)
