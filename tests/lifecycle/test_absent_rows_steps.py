"""`keep_absent_rows` with closures, scalers, processes and saved optimizers."""

import copy

import pytest
import timm.optim
import torch
import torch.distributed as dist
from torch import nn

import normswap
from tests.support.absent import OPTIMIZERS, batches, converted, loss_of, tables
from tests.support.more_contexts import Quantised
from tests.support.ranks import on_two_processes


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


def test_a_copy_that_an_optimizer_keeps_of_a_row_stays_one():
    model = converted()
    optimizer = timm.optim.MADGRAD(model.parameters(), 0.1, weight_decay=0.1)
    normswap.keep_absent_rows(optimizer, model)
    before = tables(model)["weight"]
    ((x, target, labels),) = batches([[0, 1, 1, 0]])
    loss_of(model(x, context=labels), target).backward()
    optimizer.step()
    for rows in (optimizer.state[model[0].weight]["x0"], model[0].weight):
        assert torch.equal(rows[2], before[2])


def prepare(optimizer):
    return pytest.importorskip("accelerate").Accelerator(cpu=True).prepare(optimizer)


def trained(wrap):
    """Return model and optimizer after steps of which the last ends `keep_absent_rows`."""
    model = converted()
    optimizer = torch.optim.AdamW(list(model.parameters()), 0.1, weight_decay=0.1)
    wrapper = wrap(optimizer)
    kept = normswap.keep_absent_rows(wrapper, model)
    for count, (x, target, labels) in enumerate(batches([[0, 1, 1, 0], [1, 1, 2, 2], [0] * 4])):
        if count == 2:
            kept.remove()
        wrapper.zero_grad()
        loss_of(model(x, context=labels), target).backward()
        wrapper.step()
    return model, optimizer


@pytest.mark.parametrize(
    "wrap", [timm.optim.Lookahead, prepare, lambda o: prepare(timm.optim.Lookahead(o))]
)
def test_an_optimizer_may_be_wrapped(wrap):
    (model, optimizer), (alone, expected) = trained(wrap), trained(lambda optimizer: optimizer)
    for name, p in model.named_parameters():
        other = alone.get_parameter(name)
        assert torch.equal(p, other)
        assert torch.equal(optimizer.state[p]["exp_avg"], expected.state[other]["exp_avg"])


class Bare(torch.optim.Optimizer):
    """Does without what `Optimizer.__init__` does, and wraps no other."""

    def __init__(self, params):
        self.param_groups, self.state = [{"params": list(params)}], {}

    def step(self, closure=None):
        """Do nothing."""


def test_one_that_runs_no_hooks_is_refused():
    model = converted()
    with pytest.raises(normswap.ConversionError, match="run torch's hooks, got Bare"):
        normswap.keep_absent_rows(Bare(model.parameters()), model)


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
    normswap.set_unknown(model, "pooled")
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


def test_states_of_a_class_of_their_own_are_refused_in_the_step():
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    weight = model[0].weight
    optimizer.state[weight]["exp_avg"] = torch.zeros_like(weight).detach().as_subclass(Quantised)
    kept = normswap.keep_absent_rows(optimizer, model)
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    with pytest.raises(normswap.ConversionError, match="state 'exp_avg', a Quantised; use"):
        optimizer.step()
    assert torch.equal(weight, before)
    kept.remove()
    optimizer.step()
