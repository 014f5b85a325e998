"""How a converted model runs on a GPU: the host never waits; streams, graphs, recomputation."""

import copy
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from normswap.testing.case import LABELS, MIXED
from normswap.testing.models import make_inputs, make_model
from tests.gpu.graphs import capture
from tests.gpu.steps import EVERY, METHODS, case_of, options_of, require_near, values_of

pytestmark = pytest.mark.gpu


def prepare(method, device, name="ConvNet"):
    """Return a trained model in training mode, inputs, and labels that it has seen once."""
    case = case_of(method)
    model = case.trained(name, **options_of(case.method)).to(device, torch.float32).train()
    x = make_inputs(model, 12).to(device)
    labels = MIXED.repeat(2).to(device) if case.labelled else None
    values_of(model, x, labels, True)  # measures which rows are whose
    model.zero_grad()
    return model, x, labels


def call(model, x, labels):
    return model(x) if labels is None else model(x, context=labels)


def gradients(model, x, labels):
    """Return the output and the gradients of one step; buffers move."""
    y = call(model, x, labels)
    wanted = [p for p in model.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.sin().sum(), wanted, allow_unused=True)]


@EVERY
def test_a_step_never_makes_the_host_wait(method, cuda):
    model, x, labels = prepare(method, cuda)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    gradients(model, x, labels)
    with torch.no_grad():
        call(model.eval(), x, labels)


@EVERY
def test_another_stream_computes_the_same(method, cuda):
    model, x, labels = prepare(method, cuda)
    expected = values_of(copy.deepcopy(model), x, labels, True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = values_of(model, x, labels, True)
    torch.cuda.current_stream().wait_stream(stream)
    require_near(found, expected, 1e-5)


@EVERY
def test_a_training_step_replays_as_a_cuda_graph(method, cuda):
    """Replays on new batches train as eager steps do."""
    model, x, labels = prepare(method, cuda)
    twin, eager = copy.deepcopy(model), x.clone()
    replay, step = capture(stepper(model, x, labels)), stepper(twin, eager, labels)
    for _ in range(3):  # what ran before the capture
        step()
    for _ in range(3):
        batch = torch.randn_like(x)
        x.copy_(batch)
        eager.copy_(batch)
        found, expected = replay(), step()
        if case_of(method).method.stochastic:
            assert found.isfinite().all()
        else:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if not case_of(method).method.stochastic:
        for name, value in twin.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def stepper(model, x, labels):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step():
        optimizer.zero_grad()
        y = call(model, x, labels)
        y.sin().sum().backward()
        optimizer.step()
        return y.detach()

    return step


@pytest.mark.parametrize("method", [m for m in METHODS if case_of(m).method.stochastic])
def test_each_replay_of_a_cuda_graph_draws_anew(method, cuda):
    model, x, labels = prepare(method, cuda)
    replay = capture(lambda: call(model, x, labels).detach())
    first, *others = [replay().clone() for _ in range(9)]
    assert any(not torch.equal(y, first) for y in others)


@EVERY
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(method, reentrant, device):
    model, x, labels = prepare(method, device)
    twin = copy.deepcopy(model)
    found = []
    for each, run in ((model, call), (twin, partial(checkpoint, call, use_reentrant=reentrant))):
        torch.manual_seed(0)
        given = x.clone().requires_grad_()
        y = run(each, given, labels)
        y.sin().sum().backward()
        grads = {n: p.grad for n, p in each.named_parameters() if p.grad is not None}
        values = {"output": y, "gradient of the input": given.grad}
        values |= {f"gradient of {name}": grad for name, grad in grads.items()}
        found.append({n: v.detach().cpu().double() for n, v in values.items()})
    require_near(found[1], found[0], 1e-5)


@EVERY
def test_two_runs_are_equal_to_the_bit(method, device):
    model, x, labels = prepare(method, device)
    base = make_model().to(device).train()
    torch.use_deterministic_algorithms(True)
    try:
        gradients(base, x, None)  # torch's own layers have to have such algorithms
        runs = []
        for _ in range(2):
            twin = copy.deepcopy(model)
            torch.manual_seed(0)
            found = gradients(twin, x, labels)
            runs.append([*found, *twin.buffers()])
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(*runs, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@EVERY
def test_the_model_moves_between_devices(method, cuda):
    """There and back, and as a copy: nothing is left on the other device."""
    case = case_of(method)
    model = case.trained().to(torch.float32)
    x = make_inputs(model)
    labels = LABELS if case.labelled else None
    with torch.no_grad():
        expected = call(model, x, labels)
        for each in (model.cuda(), copy.deepcopy(model)):
            y = call(each, x.cuda(), None if labels is None else labels.cuda())
            torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(call(model.cpu(), x, labels), expected)
