"""`keep_absent_rows` against a batch norm of its own, with an optimizer of its own, a context."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import normswap
from tests.support.builders import assert_close
from tests.support.ranks import on_two_processes

K, C = 3, 4
# Labels of each step: context 2 comes late, context 0 is missing twice, one step has 1 alone.
STEPS = [[0, 1, 1, 0], [1, 1, 1, 1], [2, 0, 2, 0], [1, 2, 1, 2], [0, 1, 2, 2], [0, 0, 0, 0]]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1),
    "adam, foreach": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1, foreach=True),
    "adam, fused": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1, initial_accumulator_value=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, 0.1),
}
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


def converted(method="cn", kind=nn.BatchNorm2d):
    model = nn.Sequential(kind(C, affine=True, dtype=torch.float64))
    return normswap.convert(model, method, contexts=K, verify=False).train()


def batches(steps=STEPS):
    generator = torch.Generator().manual_seed(0)
    for labels in steps:
        x, target = torch.randn(2, len(labels), C, 3, 3, generator=generator, dtype=torch.float64)
        yield x, target, torch.tensor(labels)


def loss_of(y, target):
    return (y - target).square().sum()


def tables(model):
    return {n: t.detach().clone() for n, t in model[0].named_parameters()}


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


def test_forwards_before_a_step_add_up():
    first, second = list(batches([[0, 0, 0, 0], [2, 2, 2, 2]]))
    model = converted()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1)
    normswap.keep_absent_rows(optimizer, model)
    before = tables(model)["bias"]
    for x, target, labels in (first, second):
        loss_of(model(x, context=labels), target).backward()
    optimizer.step()
    moved = (tables(model)["bias"] != before).any(1)
    assert moved.tolist() == [True, False, True]


def test_a_closure_computes_the_gradients_in_the_step():
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    normswap.keep_absent_rows(optimizer, model)
    for x, target, labels in batches([[0, 1, 2, 0], [1, 1, 1, 1]]):
        before = tables(model)["bias"]

        def closure(x=x, target=target, labels=labels):
            optimizer.zero_grad()
            loss = loss_of(model(x, context=labels), target)
            loss.backward()
            return loss

        assert optimizer.step(closure) > 0
    moved = (tables(model)["bias"] != before).any(1)
    assert moved.tolist() == [False, True, False]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_changes_nothing(fused):
    model = converted().float()
    optimizer = torch.optim.Adam(model.parameters(), 0.1, weight_decay=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    normswap.keep_absent_rows(optimizer, model)
    for x, target, labels in batches([[0, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]]):
        before, scale = tables(model)["bias"], scaler.get_scale()
        optimizer.zero_grad()
        factor = torch.inf if labels.eq(1).all() and scale == 2.0**10 else 1.0
        scaler.scale(factor * loss_of(model(x.float(), context=labels), target.float())).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = (tables(model)["bias"] != before).any(1).tolist()
        expected = [0 in labels, True, False] if factor == 1 else [False] * 3
        assert moved == expected


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


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", ["cn", "cn-x"])
def test_compiled_gradients_of_absent_rows_are_zero(method, training):
    torch.compiler.reset()
    (x, target, labels), *_ = batches([[0, 1, 0, 1]])
    model = converted(method).train(training)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss_of(run(x, context=labels), target).backward()
    for name in model[0].context_parameters:
        absent = (model[0].get_parameter(name).grad == 0).all(1)
        assert absent.tolist() == [False, False, True]


def on_a_process(rank):
    found = []
    # The first process has context 0, the second 1; nobody has 2.
    model = converted()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), 0.1, weight_decay=0.1)
    normswap.keep_absent_rows(optimizer, wrapped)
    for x, target, labels in batches([[rank] * 4, [1] * 4]):
        optimizer.zero_grad()
        loss_of(wrapped(x, context=labels), target).backward()
        before = tables(model)["bias"]
        optimizer.step()
        found.append((tables(model)["bias"] != before).any(1).tolist())
    return [*found, model[0].bias.detach()]


@pytest.mark.timeout(120)
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")
def test_a_context_of_any_process_is_present_on_all(tmp_path):
    first, second = (r["run"] for r in on_two_processes({"run": on_a_process}, tmp_path))
    assert first[0] == second[0] == [True, True, False]
    assert first[1] == second[1] == [False, True, False]
    assert torch.equal(first[2], second[2])


def test_state_dict_stays_standard_and_resumes():
    make = OPTIMIZERS["adam"]
    model = converted()
    optimizer = make(model.parameters())
    plain = make(converted().parameters())
    normswap.keep_absent_rows(optimizer, model)
    first, second = list(batches())[2:4]

    def step(model, optimizer, batch):
        optimizer.zero_grad()
        loss_of(model(batch[0], context=batch[2]), batch[1]).backward()
        optimizer.step()

    step(model, optimizer, first)
    saved = optimizer.state_dict()
    assert saved["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert saved.keys() == plain.state_dict().keys()
    twin = copy.deepcopy(model)
    resumed = make(twin.parameters())
    resumed.load_state_dict(copy.deepcopy(saved))
    normswap.keep_absent_rows(resumed, twin)
    step(model, optimizer, second)
    step(twin, resumed, second)
    assert torch.equal(twin[0].weight, model[0].weight)


def test_a_context_added_later_is_kept_too():
    model = converted()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    normswap.keep_absent_rows(optimizer, model)
    (x, target, labels), (other, aim, ones) = list(batches())[:2]
    loss_of(model(x, context=labels), target).backward()
    optimizer.step()
    normswap.add_context(model, optimizer=optimizer)
    before = tables(model)["bias"]
    optimizer.zero_grad()
    loss_of(model(other, context=ones), aim).backward()
    optimizer.step()
    moved = (tables(model)["bias"] != before).any(1)
    assert moved.tolist() == [False, True, False, False]


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
