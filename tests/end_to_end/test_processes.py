"""Training on two processes against one process over both their batches: whole methods."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import normswap
from tests.support.builders import assert_close, make_batch
from tests.support.ranks import on_two_processes

pytestmark = [
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
    ),
    pytest.mark.timeout(120),
]

CHANNELS = 4
KINDS = {
    "channel": {"method": "acn"},
    "position": {"method": "acn", "assignment": "position"},
    "instance": {"method": "acn", "assignment": "instance"},
    "learned": {"method": "acn", "statistics": "learned"},
    "selfnorm": {"method": "selfnorm", "placement": "norm", "gates": 2},
}
# The sizes of the two processes' batches.
SIZES = {"uneven": (5, 2), "one each": (1, 1), "one empty": (3, 0), "both empty": (0, 0)}
MODELS = ["cn", "cn-x", "acn", "selfnorm"]


def make_layer(kind):
    torch.manual_seed(4)
    settings = dict(KINDS[kind])
    if settings["method"] == "selfnorm":
        layer = normswap.SelfNorm(CHANNELS, gates=2).double()
        for gate in (layer.g, layer.f):
            nn.init.uniform_(gate.bn_weight, 0.5, 1.5)
            nn.init.normal_(gate.running_mean)
        return nn.Sequential(layer).train()
    model = normswap.convert(
        nn.Sequential(nn.BatchNorm2d(CHANNELS)).double(), verify=False, **settings
    )
    nn.init.normal_(model[0].mu)
    return model.train()


def batch_of(size, rank):
    return (1 + rank) * make_batch((size, CHANNELS, 3, 2), seed=rank, offset=3.0)


def step(model, x, cotangent):
    x = x.clone().requires_grad_()
    y = model(x)
    (y * cotangent).sum().backward()
    return {
        "y": y.detach(),
        "x": x.grad,
        "parameters": {name: p.grad for name, p in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
    }


def on_layers(rank):
    results = {}
    for kind in KINDS:
        for case, sizes in SIZES.items():
            x = batch_of(sizes[rank], rank)
            model = normswap.convert_sync_batchnorm(make_layer(kind))
            results[kind, case] = step(model, x, x.cos())
    return results


def make_net():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, CHANNELS, 3),
        nn.BatchNorm2d(CHANNELS),
        nn.ReLU(),
        nn.Conv2d(CHANNELS, CHANNELS, 1),
        nn.BatchNorm2d(CHANNELS),
        nn.Flatten(),
        nn.Linear(CHANNELS * 4, 2),
    ).double()


def make_model(method):
    if method == "selfnorm":
        # Plain batch norms would have statistics of their own; SyncBatchNorm needs a GPU.
        net = make_net()
        net[1], net[4] = nn.GroupNorm(2, CHANNELS).double(), nn.GroupNorm(2, CHANNELS).double()
        return nn.Sequential(net[:3], normswap.SelfNorm(CHANNELS).double(), *net[3:]).train()
    settings = {"contexts": 3} if method.startswith("cn") else {}
    return normswap.convert(make_net(), method, verify=False, **settings).train()


def images_of(rank, turn):
    labels = torch.tensor([[0, 0, 2, 2, 0], [1, 0, 1]][rank])
    return make_batch((len(labels), 3, 4, 4), seed=2 * turn + rank), labels


def train(model, method, batches, share=1.0):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for x, labels in batches:
        optimizer.zero_grad()
        y = model(x, context=labels) if method.startswith("cn") else model(x)
        (share * y.square().sum()).backward()
        optimizer.step()


def on_models(rank):
    results = {}
    for method in MODELS:
        model = make_model(method)
        if method == "selfnorm":
            model[1].g.synced = True
        else:
            normswap.convert_sync_batchnorm(model)
        wrapped = DistributedDataParallel(model)
        train(wrapped, method, [images_of(rank, turn) for turn in range(3)])
        results[method] = model.state_dict()
    return results


def on_unsynced(rank):
    """Return what DDP's default, to broadcast buffers, leaves of unsynchronised CN."""
    model = make_model("cn")
    wrapped = DistributedDataParallel(model)
    for turn in range(2):
        x, labels = images_of(rank, turn)
        # Context 1 is met by the second process alone, context 2 by the first.
        y = wrapped(x, context=labels)
        y.sum().backward()
    return {"stem": copy.deepcopy(model[1]), "all": model.state_dict()}


def on_join(rank):
    """Return what training leaves where the second process has fewer batches."""
    model = make_model("cn")
    wrapped = DistributedDataParallel(model)
    with wrapped.join():
        for turn in range((3, 1)[rank]):
            x, labels = images_of(rank, turn)
            wrapped(x, context=labels).sum().backward()
    return model.state_dict()


def on_fresh(rank):
    model = _Direct(normswap.ContextNormX(3, 2).double())
    DistributedDataParallel(model)(*fresh_batch(rank)).sum().backward()
    return model.state_dict()


class _Direct(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, labels):
        return self.layer(x, labels)


def fresh_batch(rank):
    size = (4, 1)[rank]
    return make_batch((size, 3, 2, 2), seed=rank, offset=2.0), torch.zeros(size).long() + rank


def on_fsdp(rank):
    mesh = init_device_mesh("cpu", (2,))
    results = {}
    for method in ("cn", "cn-x", "acn"):
        model = normswap.convert_sync_batchnorm(make_model(method))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        train(model, method, [images_of(rank, turn) for turn in range(3)])
        results[method] = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in model.state_dict().items()
        }
    return results


def make_parts():
    """Return a converted model of two parts with norms."""
    net = make_net()
    parts = nn.Sequential(net[:3], net[3:])
    return normswap.convert(parts, "cn", contexts=3, verify=False).train()


def on_wrapped_parts(rank):
    """Return what training leaves of a model whose parts were wrapped after its conversion."""
    wrappers = {
        "ddp": DistributedDataParallel,
        "fsdp1": lambda part: FullyShardedDataParallel(
            part, device_id=torch.device("cpu"), use_orig_params=True
        ),
    }
    results = {}
    for name, wrap in wrappers.items():
        model = normswap.convert_sync_batchnorm(make_parts())
        model[0], model[1] = wrap(model[0]), wrap(model[1])
        train(model, "cn", [images_of(rank, turn) for turn in range(3)])
        x, labels = images_of(rank, 3)
        results[name] = model.eval()(x, context=labels).detach()
    return results


JOBS = {
    "wrapped": on_wrapped_parts,
    "layers": on_layers,
    "models": on_models,
    "unsynced": on_unsynced,
    "join": on_join,
    "fresh": on_fresh,
    "fsdp": on_fsdp,
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_processes(JOBS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_on_two_processes_equal_one_over_both_batches(ranks, kind, case):
    actual = [results["layers"][kind, case] for results in ranks]
    x = torch.cat([batch_of(size, rank) for rank, size in enumerate(SIZES[case])])
    expected = step(make_layer(kind), x, x.cos())
    for name in ("y", "x"):
        joined = torch.cat([result[name] for result in actual])
        assert joined.shape == expected[name].shape
        if len(joined):
            assert_close(joined, expected[name])
    for name, gradient in expected["parameters"].items():
        parts = [result["parameters"][name] for result in actual]
        if gradient is None:
            assert all(part is None or not part.any() for part in parts), name
        else:
            assert_close(sum(parts), gradient)
    for name, value in expected["buffers"].items():
        first, second = (result["buffers"][name] for result in actual)
        assert torch.equal(first, second), name
        assert_close(first.double(), value.double())


def one_process(method):
    model = make_model(method)
    batches = [
        tuple(map(torch.cat, zip(*(images_of(rank, turn) for rank in range(2)), strict=True)))
        for turn in range(3)
    ]
    train(model, method, batches, share=0.5)  # DDP and FSDP average gradients over processes
    return model.state_dict()


@pytest.mark.parametrize("method", MODELS)
def test_models_train_as_on_one_process(ranks, method):
    first, second = (results["models"][method] for results in ranks)
    for name, value in one_process(method).items():
        assert torch.equal(first[name], second[name]), name
        assert_close(first[name].double(), value.double())


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp1"])
def test_parts_wrapped_after_conversion_train_as_on_one_process(ranks, wrapper):
    model = make_parts()
    batches = [
        tuple(map(torch.cat, zip(*(images_of(rank, turn) for rank in range(2)), strict=True)))
        for turn in range(4)
    ]
    train(model, "cn", batches[:3], share=0.5)
    x, labels = batches[3]
    expected = model.eval()(x, context=labels)
    assert_close(torch.cat([results["wrapped"][wrapper] for results in ranks]), expected)


@pytest.mark.parametrize("method", ["cn", "cn-x", "acn"])
def test_sharded_models_train_as_on_one_process(ranks, method):
    first, second = (results["fsdp"][method] for results in ranks)
    for name, value in one_process(method).items():
        assert torch.equal(first[name], second[name]), name
        assert_close(first[name].double(), value.double())


def test_ddp_loses_no_contexts_running_statistics(ranks):
    first, second = (results["unsynced"] for results in ranks)
    for name, value in first["all"].items():
        assert torch.equal(value, second["all"][name]), name
    model = make_model("cn")
    conv = model[0]
    mean = torch.zeros(3, CHANNELS, dtype=torch.float64)
    var = torch.ones(3, CHANNELS, dtype=torch.float64)
    for turn in range(2):
        x, labels = map(torch.cat, zip(images_of(0, turn), images_of(1, turn), strict=True))
        values = conv(x).detach()
        for context in range(3):
            own = values[labels == context].movedim(1, 0).flatten(1)
            mean[context] += 0.1 * (own.mean(1) - mean[context])
            var[context] += 0.1 * (own.var(1) - var[context])
    assert_close(first["stem"].running_mean, mean)
    assert_close(first["stem"].running_var, var)
    assert first["stem"].num_batches_tracked.tolist() == [2, 2, 2]


def test_in_ddps_join_no_process_waits_for_one_without_batches(ranks):
    first, second = (results["join"] for results in ranks)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    # As with BatchNorm there, buffers are those of the process that has batches.
    assert first["1.num_batches_tracked"].tolist() == [3, 0, 3]


def test_fresh_cnx_starts_alike_on_all_processes(ranks):
    first, second = (results["fresh"] for results in ranks)
    plain = normswap.ContextNormX(3, 2).double()
    x, labels = map(torch.cat, zip(fresh_batch(0), fresh_batch(1), strict=True))
    plain(x, labels)
    for name in ("mu", "log_sigma"):
        assert torch.equal(first[f"layer.{name}"], second[f"layer.{name}"])
        assert_close(first[f"layer.{name}"], plain.get_parameter(name))
    assert not torch.equal(plain.mu[0], plain.mu[1])


def on_gpu(rank):
    results = {}
    for method in ("cn", "cn-x", "acn"):
        model = normswap.convert_sync_batchnorm(make_model(method)).cuda()
        wrapped = DistributedDataParallel(model, device_ids=[rank])
        batches = [tuple(t.cuda() for t in images_of(rank, turn)) for turn in range(3)]
        train(wrapped, method, batches)
        results[method] = {name: value.cpu() for name, value in model.state_dict().items()}
    return results


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_models_train_on_two_gpus_as_on_one_process(tmp_path):
    found = on_two_processes({"gpu": on_gpu}, tmp_path, "nccl")
    first, second = (results["gpu"] for results in found)
    for method in ("cn", "cn-x", "acn"):
        for name, value in one_process(method).items():
            assert torch.equal(first[method][name], second[method][name]), name
            assert_close(first[method][name].double(), value.double(), share=1e-9)
