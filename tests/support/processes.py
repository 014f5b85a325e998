"""Models to train on two processes."""

import copy

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import normswap
from tests.support.builders import make_batch

CHANNELS = 4
MODELS = ["cn", "cn-x", "acn", "selfnorm"]


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


def on_sharded_changes(rank):
    """Return what changes of a sharded model raise."""
    model = make_model("cn")
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    changes = {
        "add_context": lambda: normswap.add_context(model, "night"),
        "remove_context": lambda: normswap.remove_context(model, 0),
        "specialize": lambda: normswap.specialize(model, 0, inplace=True),
        "revert": lambda: normswap.revert(model, 0),
    }
    raised = {}
    for name, change in changes.items():
        try:
            change()
        except normswap.ConversionError as error:
            raised[name] = str(error)
    return raised


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
    "models": on_models,
    "unsynced": on_unsynced,
    "join": on_join,
    "fresh": on_fresh,
    "fsdp": on_fsdp,
    "sharded changes": on_sharded_changes,
}
