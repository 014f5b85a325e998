import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from normswap.errors import ConversionError, InputError, UnknownNameError
from normswap.methods.selfnorm import SelfNorm
from tests.support.sampling import sampled

SHAPES = [(4, 3), (4, 3, 5), (4, 3, 4, 2), (4, 3, 2, 3, 2)]


def trained(num_features, gates, init="identity", dtype=torch.float64):
    """A layer with every parameter and buffer away from its start."""
    layer = SelfNorm(num_features, gates, init, dtype=dtype)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return layer


@pytest.mark.parametrize("gates", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_matches_float64_after_rounding(dtype, gates):
    torch.manual_seed(0)
    layer = trained(3, gates, dtype=torch.float32)
    x = (torch.randn(4, 3, 16, 16) + 10).to(dtype)
    expected = copy.deepcopy(layer).double()(x.double())
    y = layer(x)
    assert y.dtype == dtype
    apart = (y.double() - expected).abs() / expected.abs()
    assert apart.max() <= torch.finfo(dtype).eps


def test_autocast_keeps_the_input_dtype():
    layer, x = trained(3, 2, dtype=torch.float32), torch.randn(4, 3, 4, 4)
    expected = layer.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        low = layer(x.bfloat16())
    assert torch.equal(y, expected)
    assert low.dtype == torch.bfloat16


@pytest.mark.parametrize("gates", [1, 2])
def test_memory_format_is_kept(gates):
    x = torch.randn(4, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    layer = trained(3, gates, dtype=torch.float32)
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(x.contiguous()))


def test_eval_treats_instances_one_by_one():
    layer, x = trained(3, 2).eval(), torch.randn(4, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), torch.cat([layer(row) for row in x.split(1)]))


def test_an_empty_batch_passes():
    x = torch.randn(0, 3, 4, 4)
    assert torch.equal(SelfNorm(3)(x), x)


def test_state_dict_is_clean_and_copies_are_equal():
    names = ("weight", "bn_weight", "bn_bias", "running_mean", "running_var")
    for gates, prefixes in ((1, "g"), (2, "gf")):
        layer = trained(3, gates)
        assert set(layer.state_dict()) == {
            f"{p}.{n}" for p, n in itertools.product(prefixes, names)
        }
        assert {n for n, _ in layer.named_parameters()} == {
            f"{p}.{n}" for p, n in itertools.product(prefixes, names[:3])
        }
        x = torch.randn(4, 3, 5, dtype=torch.float64)
        fresh = SelfNorm(3, gates, dtype=torch.float64)
        fresh.load_state_dict(layer.state_dict())
        twins = [fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
        expected = layer.eval()(x)
        assert all(torch.equal(twin.eval()(x), expected) for twin in twins)


def test_no_submodule_looks_like_a_norm_of_the_model():
    batch_norm = nn.modules.batchnorm._NormBase
    assert not any(isinstance(m, batch_norm) for m in SelfNorm(3, 2).modules())


def test_parameters_exist_before_the_first_forward_and_meta_allocates_nothing():
    layer = SelfNorm(3, 2, device=torch.device("meta"))
    assert all(t.is_meta for t in layer.state_dict().values())
    layer = layer.to_empty(device="cpu")
    for gate in (layer.g, layer.f):
        gate.reset_parameters()
    x = torch.randn(4, 3, 4)
    assert torch.equal(layer(x), x)


def test_bad_arguments_are_named():
    with pytest.raises(ConversionError, match="num_features= of at least 1, got 0"):
        SelfNorm(0)
    with pytest.raises(ConversionError, match=r"gates= in \[1, 2\], got 3"):
        SelfNorm(3, 3)
    with pytest.raises(UnknownNameError, match="identity, paper"):
        SelfNorm(3, init="ones")
    with pytest.raises(InputError, match=r"expected input \(N, 3, \*\).*got \(4, 5, 3\)"):
        SelfNorm(3)(torch.randn(4, 5, 3))
    assert repr(SelfNorm(3, 2, "paper")).startswith("SelfNorm(\n  3, gates=2, init='paper'")


@pytest.mark.parametrize(
    ("gates", "backend"), sampled([(1, "aot_eager"), (2, "aot_eager"), (2, "inductor")], 2)
)
def test_compiles_whole_in_training(gates, backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = trained(3, gates)
    twin = copy.deepcopy(layer)
    run = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    grads = []
    for call, module in ((run, layer), (twin, twin)):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        grads.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *module.parameters()])])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for a, b in zip(layer.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("gates", [1, 2])
def test_exports_in_eval(gates):
    layer, x = trained(3, gates, dtype=torch.float32).eval(), torch.randn(2, 3, 4, 4)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    larger = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(program.module()(larger), layer(larger))
