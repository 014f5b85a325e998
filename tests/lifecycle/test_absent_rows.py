"""`keep_absent_rows` against a batch norm of its own, with an optimizer of its own, a context."""

import copy

import pytest
import torch
from torch import nn

import normswap
from tests.support.absent import OPTIMIZERS, C, K, batches, converted, loss_of, tables
from tests.support.builders import assert_close
from tests.support.sampling import crossed

EACH = pytest.mark.parametrize("name", OPTIMIZERS)


class Apart(nn.Module):
    """What a model of one CN does, as one batch norm a context."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(C, dtype=torch.float64) for _ in range(K))

    def forward(self, x, labels):
        y = torch.empty_like(x)
        for k in labels.unique().tolist():
            y[labels == k] = self.norms[k](x[labels == k])
        return y


def state_of(optimizer, model, name):
    return optimizer.state[model[0].get_parameter(name)]


@EACH
def test_training_is_that_of_a_module_and_an_optimizer_a_context(name):
    # With priors of 1 the tables are gamma and beta themselves.
    model, apart = converted(), Apart()
    layer = model[0]
    layer.priors.fill_(1)
    with torch.no_grad():
        layer.weight.fill_(1)
    optimizer = OPTIMIZERS[name](model.parameters())
    each = [OPTIMIZERS[name](norm.parameters()) for norm in apart.norms]
    normswap.keep_absent_rows(optimizer, model)
    for count, (x, target, labels) in enumerate(batches()):
        optimizer.zero_grad()
        apart.zero_grad()
        loss_of(model(x, context=labels), target).backward()
        loss_of(apart(x, labels), target).backward()
        optimizer.step()
        for k in labels.unique().tolist():
            share_step_count(each[k], count)
            each[k].step()
        for k, norm in enumerate(apart.norms):
            assert_close(layer.weight[k], norm.weight)
            assert_close(layer.bias[k], norm.bias)


def share_step_count(optimizer, count):
    """Let Adam count the steps of all contexts, as it does in a table."""
    if not isinstance(optimizer, torch.optim.Adam):
        return
    moments = ["exp_avg", "exp_avg_sq"]
    if optimizer.defaults["amsgrad"]:
        moments.append("max_exp_avg_sq")
    for p in optimizer.param_groups[0]["params"]:
        state = optimizer.state[p]
        for key in moments:
            state.setdefault(key, torch.zeros_like(p))
        state["step"] = torch.tensor(float(count))


@pytest.mark.parametrize(
    ("method", "kind"),
    [("cn", nn.BatchNorm2d), ("cn-x", nn.BatchNorm2d), ("cn", nn.InstanceNorm2d)],
)
def test_absent_rows_and_their_state_stay_to_the_bit(method, kind):
    model = converted(method, kind)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1)
    normswap.keep_absent_rows(optimizer, model)
    names = model[0].context_parameters
    for x, target, labels in batches():
        before = tables(model)
        states = {n: copy.deepcopy(state_of(optimizer, model, n)) for n in names}
        optimizer.zero_grad()
        loss_of(model(x, context=labels), target).backward()
        optimizer.step()
        present = torch.tensor([k in labels for k in range(K)])
        for n in names:
            after, state = tables(model)[n], state_of(optimizer, model, n)
            assert torch.equal(after[~present], before[n][~present])
            assert (after[present] != before[n][present]).any(1).all()
            for key in states[n].keys() & {"exp_avg", "exp_avg_sq"}:
                assert torch.equal(state[key][~present], states[n][key][~present])


def test_without_it_absent_rows_move():
    model = converted()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    handle = normswap.keep_absent_rows(optimizer, model)
    handle.remove()
    (x, target, labels), (other, aim, ones) = list(batches())[:2]
    for step in ((x, target, labels), (other, aim, ones)):
        before = tables(model)["weight"]
        optimizer.zero_grad()
        loss_of(model(step[0], context=step[2]), step[1]).backward()
        optimizer.step()
    assert not torch.equal(tables(model)["weight"][0], before[0])


def test_samples_without_a_label_move_the_rows_of_the_policy():
    model = normswap.convert(
        nn.Sequential(nn.BatchNorm2d(C)), "cn", contexts=K, unknown="pooled", verify=False
    ).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    normswap.keep_absent_rows(optimizer, model)
    before = tables(model)["bias"]
    model(torch.randn(4, C, 3, 3), context=[1, 1, None, 1]).square().sum().backward()
    optimizer.step()
    assert (tables(model)["bias"] != before).any(1).all()


def test_samples_without_a_gradient_do_not_count():
    (x, _, labels), *_ = batches([[0, 1, 0, 1]])
    model = converted()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    normswap.keep_absent_rows(optimizer, model)
    before = tables(model)["bias"]
    (model(x, context=labels)[labels == 1]).square().sum().backward()
    optimizer.step()
    moved = (tables(model)["bias"] != before).any(1)
    assert moved.tolist() == [False, True, False]


@pytest.mark.parametrize(("method", "training"), crossed(["cn", "cn-x"], [True, False]))
def test_compiled_gradients_of_absent_rows_are_zero(method, training):
    torch.compiler.reset()
    (x, target, labels), *_ = batches([[0, 1, 0, 1]])
    model = converted(method).train(training)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss_of(run(x, context=labels), target).backward()
    for name in model[0].context_parameters:
        absent = (model[0].get_parameter(name).grad == 0).all(1)
        assert absent.tolist() == [False, False, True]


def test_other_parameters_are_left_to_the_optimizer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C))
    model = normswap.convert(model, "cn", contexts=K, verify=False).train()
    twin = copy.deepcopy(model)
    x = torch.randn(4, C, 3, 3)
    for each in (model, twin):
        optimizer = torch.optim.AdamW(each.parameters(), 0.1)
        if each is model:
            normswap.keep_absent_rows(optimizer, each)
        for _ in range(3):
            optimizer.zero_grad()
            each(x, context=torch.tensor([0, 1, 0, 1])).sin().sum().backward()
            optimizer.step()
    assert torch.equal(model[0].weight, twin[0].weight)
    assert torch.equal(model[1].weight[:2], twin[1].weight[:2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: torch.optim.LBFGS(m.parameters()), "LBFGS"),
        (lambda m: torch.optim.SGD([torch.zeros(2)], 0.1), "found none"),
        (lambda m: object(), "as a torch optimizer, got object"),
    ],
)
def test_optimizers_that_cannot_do_it_are_refused(make, message):
    model = converted()
    with pytest.raises(normswap.ConversionError, match=message):
        normswap.keep_absent_rows(make(model), model)
