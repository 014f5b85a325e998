"""What is trained: parameter groups and freezing, with torch's and timm's tools."""

import copy
import pickle

import pytest
import timm
import timm.optim
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import normswap
from tests.support.models import ConvNet

METHODS = ["cn", "cn-x", "acn", "selfnorm", "crossnorm", "cnsn"]
TABLES = {
    "cn": {"weight", "bias"},
    "cn-x": {"mu", "log_sigma"},
    "acn": {"prior_logits", "mu", "log_sigma"},
}


def convert(model, method, **settings):
    if takes_context(method):
        settings.setdefault("contexts", 3)
    return normswap.convert(model, method, verify=False, **settings)


def takes_context(method):
    return normswap.get_method(method).needs_context


def decayed(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}


def conv_and_head_weights(model):
    kinds = (nn.Conv2d, nn.Linear)
    return {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, kinds)}


@pytest.mark.parametrize("method", METHODS)
def test_decay_spares_norms_and_biases_only(method):
    model = convert(ConvNet(), method)
    groups = normswap.param_groups(model, lr=0.1, weight_decay=0.05)
    assert decayed(model, groups) == conv_and_head_weights(model)
    listed = [id(p) for g in groups for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("layer_decay", [None, 0.7])
@pytest.mark.parametrize("method", METHODS)
def test_timms_own_factory_spares_the_same(method, layer_decay):
    model = convert(timm.create_model("resnet10t"), method)
    optimizer = timm.optim.create_optimizer_v2(
        model, "adamw", lr=0.1, weight_decay=0.05, layer_decay=layer_decay
    )
    assert decayed(model, optimizer.param_groups) == conv_and_head_weights(model)


def test_what_a_model_exempts_stays_exempt():
    model = timm.create_model("levit_conv_128s", num_classes=3)
    own = set(model.no_weight_decay())
    converted = convert(model, "cn")
    assert own
    assert own < set(converted.no_weight_decay())
    assert not own & decayed(converted, normswap.param_groups(converted, 0.1, 0.05))


def test_exemptions_follow_copies_and_pickles():
    model = convert(ConvNet(), "cn")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        del other.neck
        gone = model.no_weight_decay() - other.no_weight_decay()
        wanted = {"neck.weight", "neck.bias"}
        assert {name for name in gone if not name.startswith("_orig_mod")} == wanted


def test_norms_have_a_rate_of_their_own():
    model = convert(ConvNet(), "cn-x")
    model.neck = nn.LayerNorm(4)
    groups = normswap.param_groups(model, lr=0.1, norm_lr=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    fast = {names[id(p)] for g in groups if g["lr"] == 0.5 for p in g["params"]}
    norms = {n for n in names.values() if ".bn." in n or n.startswith(("stem.1", "neck"))}
    assert fast == norms
    assert {g["lr"] for g in groups} == {0.1, 0.5}


def test_layer_decay_gives_a_norm_the_rate_of_its_layer():
    base = timm.create_model("resnet10t", num_classes=3)
    model = convert(base, "cn-x")
    scale = {
        id(p): g["lr_scale"]
        for g in timm.optim.param_groups_layer_decay(base, layer_decay=0.5)
        for p in g["params"]
    }
    expected = {n: scale[id(p)] for n, p in base.named_parameters()}
    groups = normswap.param_groups(model, lr=2.0, layer_decay=0.5)
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    actual = {n: rate[id(p)] for n, p in model.named_parameters()}
    for name, value in actual.items():
        sibling = name.replace(".mu", ".weight").replace(".log_sigma", ".weight")
        assert value == 2.0 * expected[sibling], name
    assert len(set(actual.values())) > 3


def test_frozen_parameters_are_in_no_group():
    model = convert(ConvNet(), "cn")
    model.head.requires_grad_(False)
    listed = {id(p) for g in normswap.param_groups(model, 0.1) for p in g["params"]}
    assert listed == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "expected lr= of 0 or more, got -1.0"),
        ({"lr": float("nan")}, "expected lr="),
        ({"lr": 1.0, "weight_decay": -0.1}, "expected weight_decay="),
        ({"lr": 1.0, "norm_lr": -0.1}, "expected norm_lr="),
        ({"lr": 1.0, "layer_decay": 0.0}, r"expected layer_decay= in \(0, 1\]"),
    ],
)
def test_rates_out_of_range_are_refused(settings, message):
    with pytest.raises(normswap.ConversionError, match=message):
        normswap.param_groups(convert(ConvNet(), "cn"), **settings)


def test_nothing_to_train_is_refused():
    model = convert(ConvNet(), "cn").requires_grad_(False)
    with pytest.raises(normswap.ConversionError, match="requires a gradient"):
        normswap.param_groups(model, 0.1)


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
    model = convert(Mixed(), method, select="first")
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


@pytest.mark.parametrize("method", METHODS)
def test_the_average_of_a_model_is_its_running_mean(method):
    model = convert(ConvNet(), method).train()
    ema = ModelEmaV3(model, decay=0.5)
    start = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.update(model)
    for name, value in ema.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.5 * (start[name] + model.state_dict()[name]))
    x = torch.randn(2, 3, 6, 6)
    assert ema.module(x).shape == (2, 5)


@pytest.mark.parametrize("method", ["cn", "cn-x", "acn", "selfnorm"])
def test_accumulated_gradients_are_those_of_the_sum(method):
    model = convert(ConvNet(), method)
    normswap.freeze(model, train="all", stats="frozen")  # batches are then independent
    model.double().train()
    x = torch.randn(6, 3, 6, 6, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])

    def backward(rows):
        given = (x[rows], labels[rows]) if takes_context(method) else (x[rows],)
        model(*given).square().sum().backward()

    backward(slice(0, 6))
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    backward(slice(0, 2))
    backward(slice(2, 6))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_autocast_with_a_scaler_trains_float32_statistics(method, dtype):
    model = convert(ConvNet(), method).train()
    optimizer = torch.optim.SGD(normswap.param_groups(model, 0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    x, labels = torch.randn(6, 3, 6, 6), torch.tensor([0, 1, 2, 0, 1, 2])
    before = copy.deepcopy(model.state_dict())
    with torch.autocast("cpu", dtype):
        given = (x, labels) if takes_context(method) else (x,)
        loss = model(*given).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    after = model.state_dict()
    assert all(v.dtype == before[n].dtype for n, v in after.items())
    assert all(bool(v.isfinite().all()) for v in after.values())
    moved = [n for n in before if not torch.equal(before[n], after[n])]
    assert {"stem.0.weight", "head.weight"} <= set(moved)


def test_timms_factory_spares_the_norms_of_a_compiled_model():
    model = convert(ConvNet(), "cn-x")
    compiled = torch.compile(model, backend="eager")
    optimizer = timm.optim.create_optimizer_v2(compiled, "adamw", lr=0.1, weight_decay=0.05)
    assert decayed(model, optimizer.param_groups) == conv_and_head_weights(model)


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


NO_NUMBERS = [
    (name, value)
    for name in ("lr", "weight_decay", "norm_lr", "layer_decay")
    for value in ("0.1", None, True, [0.1])
    if value is not None or name in ("lr", "weight_decay")  # the others are None by default
]


@pytest.mark.parametrize(("name", "value"), NO_NUMBERS)
def test_what_is_no_number_is_refused(name, value):
    with pytest.raises(normswap.ConversionError, match=f"expected {name}="):
        normswap.param_groups(convert(ConvNet(), "cn"), **{"lr": 0.1, name: value})
