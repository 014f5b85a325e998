"""Synchronised layers on two processes against one process over both their batches."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import normswap
from tests.support.builders import SKEWED, assert_close, make_batch, make_cn
from tests.support.ranks import on_two_processes

pytestmark = [
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
    ),
    pytest.mark.timeout(90),
]

CHANNELS = 4
# For each of two processes: the shape of a sample, and labels.
CASES = {
    "uneven, each lacks a context": [((3, 2), [0, 2, 2, 0, 2]), ((3, 2), [0, 1, 0])],
    "unlabelled samples on one": [((3, 2), [0, -1, 1, 2]), ((3, 2), [1, 2])],
    "one without labels": [((5,), [0, 1, 1]), ((5,), [-1, -1])],
    "one empty": [((3, 2), [0, 1, 1, 0]), ((3, 2), [])],
    "both empty": [((3, 2), []), ((3, 2), [])],
    "sizes of images differ": [((5, 2), [0, 1, 2]), ((2, 3), [1, 1, 0, 2])],
    "one value each": [((), [0, 1]), ((), [0, 2])],
}
SETTINGS = [("pooled", 0.1), (1, None)]  # unknown, momentum
FIRST = next(iter(CASES))


def batch_of(case, rank):
    size, labels = CASES[case][rank]
    x = make_batch((len(labels), CHANNELS, *size), seed=rank, offset=3.0)
    return x, torch.tensor(labels, dtype=torch.int64)


def step(layer, x, labels, cotangent):
    """Return everything one training step computes."""
    x = x.clone().requires_grad_()
    y = layer(x, labels)
    (y * cotangent).sum().backward()
    return {
        "y": y.detach(),
        "x": x.grad,
        "parameters": {name: p.grad for name, p in layer.named_parameters()},
        "buffers": dict(layer.named_buffers()),
    }


def layer_for(setting, synced):
    unknown, momentum = setting
    return make_cn(
        CHANNELS, priors=SKEWED, unknown=unknown, momentum=momentum, synced=synced
    ).train()


def cotangent_of(x, rank):
    return make_batch(tuple(x.shape), seed=10 + rank).cos()


def flat(x):
    """Return every position as a sample: the statistics are the same, and sizes may differ."""
    return x.movedim(1, -1).reshape(-1, CHANNELS)


def make_net():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, CHANNELS, 3),
        nn.SyncBatchNorm(CHANNELS),
        nn.ReLU(),
        nn.Conv2d(CHANNELS, CHANNELS, 1),
        nn.SyncBatchNorm(CHANNELS),
        nn.Flatten(),
        nn.Linear(CHANNELS * 4, 2),
    ).double()


def images_of(rank):
    labels = torch.tensor([[0, 0, 2, 2, 0], [1, 0, 1]][rank])
    return make_batch((len(labels), 3, 4, 4), seed=rank), labels


def train(model, x, labels, share=1.0):
    """Take two steps; `share` scales the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        (share * model(x, context=labels).square().sum()).backward()
        optimizer.step()


def converted(norm):
    return normswap.convert(nn.Sequential(norm.double()), "cn", contexts=3).train()


def step_first(rank, model):
    x, labels = batch_of(FIRST, rank)
    return step(model[0], x, labels, cotangent_of(x, rank))


def on_cases(rank):
    results = {}
    for case in CASES:
        for setting in SETTINGS:
            x, labels = batch_of(case, rank)
            layer = layer_for(setting, True)
            results[case, setting] = step(layer, x, labels, cotangent_of(x, rank))
    return results


def on_ddp(rank):
    model = normswap.convert(make_net(), "cn", contexts=3).train()
    train(DistributedDataParallel(model), *images_of(rank))
    return model.state_dict()


def on_groups(rank):
    """Return steps of copies of layers with a group of this process alone, of both, of one."""
    first, second, both = (dist.new_group(ranks) for ranks in ([0], [1], [0, 1]))
    results = {}
    for name, group in (("alone", [first, second][rank]), ("both", both), ("first", first)):
        norm = nn.SyncBatchNorm(CHANNELS, process_group=group)
        normswap.plan(nn.Sequential(norm), "cn", contexts=3)
        model = converted(norm)
        results[name, "copy"] = step_first(rank, copy.deepcopy(model))
        results[name, "pickle"] = step_first(rank, pickle.loads(pickle.dumps(model)))
    return results


def on_compile(rank):
    layer = layer_for(SETTINGS[0], True)
    layer.compile(backend="aot_eager", fullgraph=True)
    return step_first(rank, [layer])


def on_adapt(rank):
    """Return the state after adapting to batches of each process."""
    model = normswap.convert(make_net(), "cn", contexts=3)
    normswap.adapt(model, [images_of(rank)[0], images_of(rank)[0] * 2], 1)
    return model.state_dict()


def on_revert(rank):
    """Return whether reverted copies have the group of the norm."""
    groups = [dist.new_group([0]), dist.new_group([0, 1])]
    found = []
    for group in (groups[1 - rank], None):
        model = converted(nn.SyncBatchNorm(CHANNELS, process_group=group))
        for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            norm = normswap.revert(twin)[0]
            found.append(type(norm) is nn.SyncBatchNorm and norm.process_group is group)
    return found


def on_plain(rank):
    return step_first(rank, converted(nn.BatchNorm2d(CHANNELS)))


JOBS = {
    "cases": on_cases,
    "ddp": on_ddp,
    "groups": on_groups,
    "plain": on_plain,
    "compiled": on_compile,
    "adapted": on_adapt,
    "reverted": on_revert,
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_processes(JOBS, tmp_path_factory.mktemp("ranks"))


def assert_same_step(actual, expected):
    for name in ("y", "x"):
        assert_close(actual[name], expected[name])
    for kind in ("parameters", "buffers"):
        for name, value in expected[kind].items():
            assert_close(actual[kind][name].double(), value.double())


def assert_one_process(actual, case, make_layer):
    """Compare steps of both processes with one process over both their batches."""
    batches = [batch_of(case, rank) for rank in range(2)]
    expected = step(
        make_layer(),
        torch.cat([flat(x) for x, _ in batches]),
        torch.cat([y.repeat_interleave(x.shape[2:].numel()) for x, y in batches]),
        torch.cat([flat(cotangent_of(x, rank)) for rank, (x, _) in enumerate(batches)]),
    )
    for name in ("y", "x"):
        joined = torch.cat([flat(result[name]) for result in actual])
        assert joined.shape == expected[name].shape
        if len(joined):
            assert_close(joined, expected[name])
    for name, gradient in expected["parameters"].items():
        assert_close(sum(result["parameters"][name] for result in actual), gradient)
    for name, value in expected["buffers"].items():
        first, second = (result["buffers"][name] for result in actual)
        assert torch.equal(first, second)
        assert_close(first, value)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one_over_both_batches(ranks, case, setting):
    actual = [results["cases"][case, setting] for results in ranks]
    assert_one_process(actual, case, lambda: layer_for(setting, False))


def test_compiled_layer_computes_the_same_on_two_processes(ranks):
    for results in ranks:
        assert_same_step(results["compiled"], results["cases"][FIRST, SETTINGS[0]])


def test_ddp_trains_as_one_process_over_both_batches(ranks):
    first, second = (results["ddp"] for results in ranks)
    model = normswap.convert(make_net(), "cn", contexts=3).train()
    x, labels = (torch.cat(parts) for parts in zip(*map(images_of, range(2)), strict=True))
    train(model, x, labels, share=0.5)  # DDP averages gradients over processes
    for name, value in model.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        assert_close(first[name], value)


def test_two_processes_adapt_as_one_over_both_batches(ranks):
    first, second = (results["adapted"] for results in ranks)
    model = normswap.convert(make_net(), "cn", contexts=3)
    x = torch.cat([images_of(rank)[0] for rank in range(2)])
    normswap.adapt(model, [x, x * 2], 1)
    for name, value in model.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        assert_close(first[name], value)


def test_a_reverted_norm_has_its_process_group(ranks):
    assert all(all(results["reverted"]) for results in ranks)


@pytest.mark.parametrize("way", ["copy", "pickle"])
def test_copies_keep_the_process_group(ranks, way):
    for rank, results in enumerate(ranks):
        alone = step_first(rank, converted(nn.BatchNorm2d(CHANNELS)))
        assert_same_step(results["groups"]["alone", way], alone)
        assert_same_step(results["groups"]["first", way], alone)
    both = [results["groups"]["both", way] for results in ranks]
    assert_one_process(both, FIRST, lambda: converted(nn.BatchNorm1d(CHANNELS))[0])


def test_plain_batch_norm_stays_per_process(ranks):
    for rank, results in enumerate(ranks):
        assert_same_step(results["plain"], step_first(rank, converted(nn.BatchNorm2d(CHANNELS))))


def test_conversion_keeps_what_is_synchronised():
    net = nn.Sequential(nn.SyncBatchNorm(CHANNELS), nn.BatchNorm2d(CHANNELS))
    layers = normswap.convert(net, "cn", contexts=3)
    assert [layer.synced for layer in layers] == [True, False]
    assert ["synced" in repr(layer) for layer in layers] == [True, False]


def test_one_process_alone_computes_the_plain_layer_and_compiles():
    run = torch.compile(layer_for(SETTINGS[0], True), backend="aot_eager", fullgraph=True)
    plain = layer_for(SETTINGS[0], False)
    for rank in range(2):
        x, labels = batch_of(FIRST, rank)
        assert_close(run(x, labels), plain(x, labels))
