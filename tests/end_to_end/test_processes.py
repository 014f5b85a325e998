"""Training on two processes against one process over both their batches: whole methods."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import normswap
from tests.support.builders import assert_close
from tests.support.processes import (
    CHANNELS,
    JOBS,
    MODELS,
    fresh_batch,
    images_of,
    make_model,
    make_parts,
    train,
)
from tests.support.ranks import on_two_processes

pytestmark = [
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
    ),
    pytest.mark.timeout(120),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_processes(JOBS, tmp_path_factory.mktemp("ranks"))


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


@pytest.mark.parametrize("change", ["add_context", "remove_context", "specialize", "revert"])
def test_changes_of_a_sharded_model_say_how_to_gather_it(ranks, change):
    for results in ranks:
        assert "full_state_dict=True" in results["sharded changes"][change]


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
