import copy
import pickle

import pytest
import torch

from normswap.errors import ConversionError, InputError, UnknownNameError
from normswap.functional.style import cross_norm, draw_box
from normswap.methods.crossnorm import CROPS, CrossNorm
from tests.support.sampling import sampled

FEATURES = [(4, 3, 6), (4, 3, 5, 4), (4, 3, 3, 4, 4)]


def is_rewritten(y, x):
    return not torch.equal(y, x)


@pytest.mark.parametrize("fire", [None, True, torch.tensor(True)])
def test_eval_is_the_identity(fire):
    x = torch.randn(4, 3, 5, 5)
    assert CrossNorm(p=1.0).eval()(x, fire) is x


def test_fire_false_costs_no_draw_and_returns_x():
    x, state = torch.randn(4, 3, 5, 5), torch.get_rng_state()
    assert CrossNorm(p=1.0)(x, False) is x
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("instances", [1, 2])
@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("shape", FEATURES)
def test_the_layer_draws_and_applies_cross_norm(shape, crop, instances):
    layer = CrossNorm(crop, instances)
    x = torch.randn(shape, dtype=torch.float64)
    torch.manual_seed(5)
    y = layer(x, True)
    torch.manual_seed(5)
    permutation = torch.randperm(shape[0 if instances == 2 else 1])
    style = draw_box(shape[2:]) if crop in ("style", "both") else None
    content = draw_box(shape[2:]) if crop in ("content", "both") else None
    assert torch.equal(y, cross_norm(x, permutation, instances, content, style))
    assert is_rewritten(y, x)


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (1, 3, 4), (1, 3)])
def test_a_batch_of_one_is_left_alone(shape, crop):
    x = torch.randn(shape)
    assert CrossNorm(crop, p=1.0)(x) is x


def test_one_channel_has_no_other_channel():
    x = torch.randn(4, 1, 5, 5)
    assert CrossNorm(instances=1)(x, True) is x


@pytest.mark.parametrize("instances", [1, 2])
@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize(
    "shape",
    [
        (4, 3),
        (4, 3, 1),
        (4, 3, 1, 1),
        (4, 3, 2, 2),
        (4, 3, 3, 3),
        (4, 3, 2),
        (4, 3, 1, 1, 1),
        (0, 3, 4, 4),
    ],
)
def test_small_maps_end_and_have_no_nan(shape, crop, instances):
    # The published loop never ends on 1x1 and 2x2 maps, and its small boxes give NaN.
    layer = CrossNorm(crop, instances)
    for _ in range(20):
        x = torch.randn(shape, requires_grad=True)
        y = layer(x, True)
        assert y.isfinite().all()
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 1, 1), (4, 3, 1)])
def test_a_single_position_is_left_alone(shape):
    x = torch.randn(shape)
    assert CrossNorm("both")(x, True) is x


@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
def test_it_fires_with_probability_p(p):
    torch.manual_seed(0)
    layer, x, count = CrossNorm(p=p), torch.randn(2, 1, 2), 2000
    fired = sum(layer(x) is not x for _ in range(count))
    # Five standard deviations of Binomial(count, p); exact at 0 and 1.
    assert abs(fired - count * p) <= 5 * (count * p * (1 - p)) ** 0.5


@pytest.mark.parametrize("crop", CROPS)
def test_reproducible_from_the_seed(crop):
    layer, x = CrossNorm(crop), torch.randn(8, 3, 9, 9)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(torch.stack([layer(x) for _ in range(6)]))
    assert torch.equal(*runs)
    assert any(is_rewritten(y, x) for y in runs[0])
    assert len({tuple(y.flatten().tolist()) for y in runs[0]}) > 2


@pytest.mark.parametrize("crop", CROPS)
def test_numpy_is_not_involved(crop, monkeypatch):
    # The published crop needs np.int, which NumPy 1.24 removed.
    numpy = pytest.importorskip("numpy")
    before = pickle.dumps(numpy.random.get_state())
    CrossNorm(crop)(torch.randn(4, 3, 9, 9), True)
    assert pickle.dumps(numpy.random.get_state()) == before


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_and_memory_format_are_kept(dtype, crop):
    x = torch.randn(4, 3, 6, 6, dtype=dtype).contiguous(memory_format=torch.channels_last)
    y = CrossNorm(crop)(x, True)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert is_rewritten(y, x)


def test_constant_half_precision_channels_have_finite_gradients():
    x = torch.full((4, 3, 6, 6), 0.1, dtype=torch.float16, requires_grad=True)
    y = CrossNorm()(x, True)
    (gradient,) = torch.autograd.grad(y.float().square().sum(), x)
    assert y.isfinite().all()
    assert gradient.isfinite().all()


def test_no_state_and_copies_behave():
    layer = CrossNorm("both", 1, 2.0, 0.3)
    assert layer.state_dict() == {}
    assert list(layer.parameters()) == []
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(twin) == repr(layer) == "CrossNorm(crop='both', instances=1, beta=2.0, p=0.3)"
    assert repr(CrossNorm()) == "CrossNorm()"


def test_bad_arguments_are_named():
    with pytest.raises(UnknownNameError, match="neither, style, content, both"):
        CrossNorm("center")
    with pytest.raises(ConversionError, match=r"instances= in \[1, 2\], got 3"):
        CrossNorm(instances=3)
    with pytest.raises(ConversionError, match=r"beta= in \(0, inf\), got 0"):
        CrossNorm(beta=0)
    with pytest.raises(ConversionError, match=r"p= in \[0, 1\], got 1.5"):
        CrossNorm(p=1.5)
    with pytest.raises(InputError, match=r"\(N, C, \*\).*got \(3,\)"):
        CrossNorm()(torch.randn(3))


@pytest.mark.parametrize(
    ("crop", "backend"),
    sampled([("neither", "aot_eager"), ("both", "aot_eager"), ("both", "inductor")], 2),
)
def test_compiles_whole_in_training_and_fires_with_probability_p(crop, backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    layer, count = CrossNorm(crop, p=0.3), 400
    run = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(8, 2, 4, 4, requires_grad=True)
    fired = 0
    for _ in range(count):
        y = run(x)
        # A fired output is x only where all 8 instances keep their style: once in 8! times.
        fired += is_rewritten(y, x)
    assert abs(fired - count * 0.3) <= 5 * (count * 0.3 * 0.7) ** 0.5
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.isfinite().all()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("backend", sampled(["aot_eager", "inductor"], 1))
def test_compiled_output_is_cross_norm_of_some_permutation(backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    run = torch.compile(CrossNorm(p=1.0), fullgraph=True, backend=backend)
    x = torch.randn(2, 3, 4, 4)
    expected = [cross_norm(x, torch.tensor(order)) for order in ([0, 1], [1, 0])]
    seen = set()
    for _ in range(40):
        y = run(x)
        distances = [(y - e).abs().max().item() for e in expected]
        assert min(distances) < 1e-5
        seen.add(distances.index(min(distances)))
    assert seen == {0, 1}


@pytest.mark.parametrize("dynamic", [None, True])
def test_batch_sizes_do_not_recompile_for_ever(dynamic):
    torch._dynamo.reset()
    run = torch.compile(CrossNorm("both", p=1.0), fullgraph=True, backend="eager", dynamic=dynamic)
    torch._dynamo.utils.counters.clear()
    for batch in (2, 3, 4, 5, 6, 7, 8):
        assert run(torch.randn(batch, 2, 6, 6)).isfinite().all()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("crop", CROPS)
def test_on_a_gpu_without_waiting_for_it(crop):
    layer, x = CrossNorm(crop), torch.randn(4, 3, 9, 9, device="cuda", requires_grad=True)
    runs = []
    for _ in range(2):
        torch.manual_seed(2)
        torch.cuda.set_sync_debug_mode("error")
        try:
            outputs = [layer(x) for _ in range(6)]
            torch.stack(outputs).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        runs.append(torch.stack(outputs))
    assert torch.equal(*runs)
