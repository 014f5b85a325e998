"""What the kernels compute, on a CPU by Triton's interpreter or on a GPU; see `test_values`."""

import copy
import os

import pytest
import torch
import triton
import triton.language as tl
from torch.utils.checkpoint import checkpoint
from triton.runtime.interpreter import InterpretedFunction

import normswap
from normswap.functional import backend, kernels
from normswap.functional.labels import Context
from normswap.functional.triton import plan, tile
from normswap.functional.triton.launching import launch
from normswap.methods import cn_layer
from tests.support import builders, oracles
from tests.support.builders import assert_close, make_batch, running_of
from tests.support.fused import laid_out

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# Shares of the largest value; the interpreter cuts off what bfloat16 doesn't hold.
SHARE = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
CASES = [(dtype, layout) for dtype in SHARE for layout in ("contiguous", "channels_last")]
EVERY_CASE = pytest.mark.parametrize(("dtype", "layout"), CASES)
PRIORS = [0.4, 0.1, 0.2, 0.3]
LABELS = [2, 0, -1, 0, 3, -1, 2]  # context 1 is absent


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch):
    monkeypatch.setattr(backend, "DEVICES", (DEVICE,))


def _call_once_patched(function, *args, **kwargs):
    """Call what a kernel calls, without patching the language of Triton anew for each call.

    That stays patched, and takes the interpreter twenty times as long as most of the calls.
    """
    if function not in _PATCHED:
        _PATCHED.add(function)
        return _CALL(function, *args, **kwargs)
    return function.rewrite()(*args, **kwargs)


_PATCHED, _CALL = set(), InterpretedFunction.__call__
InterpretedFunction.__call__ = _call_once_patched


def make_cn(*args, unknown="pooled", **settings):
    return builders.make_cn(*args, unknown=unknown, **settings).to(DEVICE)


def make_weighing(*args, **settings):
    return make_cn(*args, unknown="posterior", **settings)


def make_cnx(*args, **settings):
    return builders.make_cnx(*args, **settings).to(DEVICE)


def as_labels(given):
    return None if given is None else torch.tensor(given, device=DEVICE)


def make(shape=(7, 6, 5, 3), dtype=torch.float32, layout="contiguous", offset=3.0):
    """Return x, whose channels have means as far apart as the offset, and a derivative."""
    pair = make_batch(shape, 0, offset, dtype), make_batch(shape, 1, 0.0, dtype)
    x, dy = (laid_out(t.to(DEVICE), layout) for t in pair)
    return x.requires_grad_(), dy


def widened(layer, x):
    """Return x and the parameters in float64, to differentiate, in the order of an oracle."""
    names = ("weight", "bias", "mu", "log_sigma")
    given = [p for name in names if (p := getattr(layer, name, None)) is not None]
    return given, [t.detach().double().requires_grad_() for t in (x, *given)]


def compare(layer, x, dy, labels, oracle, share=None, given=None, **settings):
    """Hold output and gradients of a layer to a loop in float64.

    The layer is given the labels, or what else is `given`.
    """
    share = share or SHARE[x.dtype]
    parameters, wide = widened(layer, x)
    y = layer(x, as_labels(labels) if given is None else given)
    expected = oracle(wide[0], labels or [-1] * len(x), *wide[1:], **settings)
    found = torch.autograd.grad(y, (x, *parameters), dy)
    wanted = torch.autograd.grad(expected, wide, dy.double(), allow_unused=True)
    assert y.stride() == found[0].stride() == x.stride()
    assert_close(y, expected, share)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, torch.zeros_like(a) if b is None else b, share)


def compare_cn(layer, x, dy, labels, share=None, **settings):
    before = running_of(layer)
    priors = (layer.priors.double() / layer.priors.double().sum()).tolist()
    settings = {"running": before, "priors": priors, "training": True} | settings
    compare(layer, x, dy, labels, oracles.cn, share, **settings)
    after, found = before, running_of(layer)
    if settings["training"]:
        after = oracles.cn_update(x.detach().double(), labels, before, layer.momentum)
    share = share or max(1e-6, 4 * torch.finfo(layer.running_mean.dtype).eps)
    assert_close(found.mean, after.mean, share)
    assert_close(found.var, after.var, share)
    assert found.tracked == after.tracked


@EVERY_CASE
def test_the_passes_over_x(dtype, layout):
    for shape in ((3, 6, 5, 3), (1, 3, 60, 40)):
        x, dy = (t.detach() for t in make(shape, dtype, layout))
        v, g = x.double().flatten(2), dy.double().flatten(2)
        one, two, three, centre = make_batch((4, *shape[:2]), 2, dtype=torch.float32).to(DEVICE)
        a, b, c, m = (t.double().unsqueeze(2) for t in (one, two, three, centre))
        share = SHARE[dtype]
        found = kernels.stats(x)
        assert_close(found.mean, v.mean(2), 1e-6)
        assert_close(found.var, v.var(2, correction=0), 1e-5)
        assert_close(kernels.affine(x, one, two).flatten(2), a * v + b, share)
        assert_close(kernels.affine(x, one[:1], None).flatten(2), a[:1] * v, share)
        found = kernels.combine(dy, x, one, two, three, centre)
        assert_close(found.flatten(2), a * g + b * (v - m) + c, share)
        dx, first, second = kernels.scale_and_dot(dy, x, centre, one)
        assert_close(dx.flatten(2), a * g, share)
        assert_close(first, g.sum(2), 1e-5)
        assert_close(second, (g * (v - m)).sum(2), 1e-5)
        first, second = kernels.dot(dy, x, centre[:1])
        assert_close(first, g.sum((0, 2)).unsqueeze(0), 1e-5)
        assert_close(second, (g * (v - m[:1])).sum((0, 2)).unsqueeze(0), 1e-5)
        assert dx.stride() == x.stride()


@EVERY_CASE
def test_cn_in_training(dtype, layout):
    layer = make_cn(6, 4, PRIORS, torch.float32)
    compare_cn(layer.train(), *make((7, 6, 5, 3), dtype, layout), LABELS)


@EVERY_CASE
def test_cn_whose_unlabelled_samples_weigh_the_contexts(dtype, layout):
    layer = make_weighing(6, 4, PRIORS, torch.float32).train()
    x, dy = make((7, 6, 5, 3), dtype, layout, offset=0.1)
    compare_cn(layer, x, dy, LABELS, unknown="posterior")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("contexts", [1, 3, 64])
@pytest.mark.parametrize("labels", [[2, -1, 1, 1, -1], [-1] * 5, [0, 2, 0, 1, 1]])
def test_some_all_and_no_samples_weigh_the_contexts(contexts, training, labels):
    layer = make_weighing(5, contexts, None, torch.float32).train(training)
    labels, (x, dy) = [min(label, contexts - 1) for label in labels], make((5, 5, 4, 2), offset=0.1)
    unseen = Context(as_labels(labels), None)
    compare_cn(layer, x, dy, labels, given=unseen, training=training, unknown="posterior")


def test_weights_keep_the_digits_where_means_are_large():
    layer = make_weighing(5, 3, None, torch.float32).train()
    layer.running_mean += 500
    x, dy = make((5, 5, 4, 2), offset=0.1)
    x = (x.detach() + 500).requires_grad_()
    compare_cn(layer, x, dy, [2, -1, 1, 1, -1], 5e-5, unknown="posterior")


@pytest.mark.parametrize(
    ("shape", "contexts", "settings"),
    [
        ((6, 4, 1, 1), 4, {}),  # contexts of one value
        ((5, 3, 7), 1, {"momentum": None}),
        ((3, 2, 3, 4, 5), 4, {"unknown": 2}),
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_cn_of_odd_sizes(shape, contexts, settings, layout):
    layer = make_cn(shape[1], contexts, None, torch.float32, **settings).train()
    labels = [min(label, contexts - 1) for label in LABELS[: shape[0]]]
    settings = {"unknown": layer.unknown}
    x, dy = make(shape, layout=layout if len(shape) > 3 else "contiguous")
    compare_cn(layer, x, dy, labels, **settings)
    compare_cn(layer, x, dy, labels, **settings)  # from other running statistics


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("maker", [make_cn, make_weighing, make_cnx])
def test_several_tiles_parts_and_steps(maker, layout, monkeypatch):
    monkeypatch.setattr(plan, "_TILE", 8)
    monkeypatch.setattr(plan, "_WIDTH", 2)
    monkeypatch.setattr(plan, "_PROGRAMS", 3 * 7 * (2 if layout == "channels_last" else 3))
    monkeypatch.setattr(plan.Rows, "blocks", {"BN": 2, "BC": 2})
    plan._plan.cache_clear()
    x, dy = make((7, 3, 5, 7), layout=layout)
    assert plan.plan(x).splits > 1
    layer = maker(3, 4, PRIORS, torch.float32).train()
    if maker is not make_cnx:
        compare_cn(layer, x, dy, LABELS, unknown=layer.unknown)
    else:
        compare(layer, x, dy, LABELS, oracles.cnx, priors=PRIORS)
    found = kernels.stats(x.detach())
    assert_close(found.var, x.double().flatten(2).var(2, correction=0), 1e-5)
    plan._plan.cache_clear()


@pytest.mark.parametrize(
    "settings",
    [{"affine": "shared"}, {"affine": "shared", "unknown": "posterior"}, {"shrink": 2.0}],
)
@pytest.mark.parametrize("training", [True, False])
def test_settings_of_cn_mean_what_they_do_in_float64(settings, training):
    layer = make_cn(6, 4, PRIORS, torch.float32, **settings).train(training)
    labels, (x, dy) = as_labels(LABELS), make()
    wide = copy.deepcopy(layer).double()

    def run(layer, x, dy):
        y = layer(x, labels)
        return y, *torch.autograd.grad(y, [x, *layer.parameters()], dy), *layer.buffers()

    expected = run(wide, x.detach().double().requires_grad_(), dy.double())
    for a, b in zip(run(layer, x, dy), expected, strict=True):
        assert_close(a, b, 4e-6)


def test_a_thousand_contexts():
    layer = make_cn(2, 1024, None, torch.float32).train()
    compare_cn(layer, *make((4, 2, 4, 2)), [1023, 5, 1023, 0])


def test_cn_keeps_the_digits_of_spreads_where_means_are_large():
    layer = make_cn(3, 2, None, torch.float32).train()
    # What a mean of 500 loses by rounding moves the output by so much, as torch's norms do.
    compare_cn(layer, *make((6, 3, 5, 5), offset=500.0), [0, 1, 1, 0, 1, 0], 5e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_may_have_another_dtype(dtype):
    layer = make_cn(6, 4, PRIORS, dtype).train()
    x, dy = make(dtype=torch.bfloat16)
    compare_cn(layer, x, dy, LABELS)


@pytest.mark.parametrize("labels", [LABELS, [0, 1, 1, 3, 0, 0, 2], None])
@pytest.mark.parametrize("mode", ["eval", "frozen"])
@pytest.mark.parametrize("maker", [make_cn, make_weighing])
def test_cn_with_running_statistics(maker, mode, labels):
    layer = maker(6, 4, PRIORS, torch.float32).train(mode == "frozen")
    if mode == "frozen":
        layer.stats_frozen = True
        labels = labels or [1] * 7
    x, dy = make()
    compare_cn(layer, x, dy, labels, training=False, unknown=layer.unknown)
    with torch.no_grad():
        given = as_labels(labels)
        assert torch.equal(layer(x, given), layer(x.requires_grad_(), given))


@EVERY_CASE
@pytest.mark.parametrize("labels", [LABELS, None])
def test_cnx(dtype, layout, labels):
    layer = make_cnx(6, 4, PRIORS, torch.float32).eval()
    compare(layer, *make((7, 6, 5, 3), dtype, layout), labels, oracles.cnx, priors=PRIORS)


def test_cnx_without_an_affine_and_with_one_context_for_the_unknown():
    layer = make_cnx(6, 4, PRIORS, torch.float32, affine=False, unknown=3).train()

    def oracle(x, labels, mu, log_sigma):
        one = torch.ones(6, dtype=torch.float64, device=DEVICE)
        return oracles.cnx(x, labels, one, 0 * one, mu, log_sigma, PRIORS, 3)

    compare(layer, *make(), LABELS, oracle)


@pytest.mark.parametrize("maker", [make_cn, make_weighing, make_cnx])
def test_one_label_for_all(maker):
    layer = maker(6, 4, PRIORS, torch.float32).eval()
    x, dy = make()
    for given in (2, -1):
        found = torch.autograd.grad(layer(x, as_labels(given)), (x, *layer.parameters()), dy)
        several = layer(x, as_labels([given] * 7))
        expected = torch.autograd.grad(several, (x, *layer.parameters()), dy)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("maker", [make_cn, make_weighing, make_cnx])
def test_where_the_first_two_contexts_answer_for_unknown_labels(maker, training):
    layer = maker(6, 4, PRIORS, torch.float32).train(training)
    layer.answering = 2
    by_formula = copy.deepcopy(layer).double()  # float64 is for torch's operators
    x, dy = make()

    def run(layer, x, dy):
        y = layer(x, as_labels(LABELS))
        return [y, *torch.autograd.grad(y, (x, *layer.parameters()), dy)]

    wide = run(by_formula, x.detach().double().requires_grad_(), dy.double())
    for found, expected in zip(run(layer, x, dy), wide, strict=True):
        assert_close(found, expected, SHARE[x.dtype])


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero)")
@pytest.mark.parametrize("maker", [make_cn, make_cnx])
def test_where_unknown_labels_are_an_error_their_rows_are_not_numbers(maker):
    layer = maker(6, 4, PRIORS, torch.float32, unknown="error").train()
    labels = as_labels(LABELS)
    x, dy = make()
    y = layer.normalize(x, labels, True)
    torch.autograd.grad(y, [x], dy)
    assert y[labels < 0].isnan().all()
    assert y[labels >= 0].isfinite().all()


@pytest.mark.parametrize("maker", [make_cn, make_weighing, make_cnx])
def test_backward_runs_twice_and_finds_the_same_bits(maker):
    layer, (x, dy) = maker(6, 4, PRIORS, torch.float32).train(), make()
    y = layer(x, as_labels(LABELS))
    wanted = (x, *layer.parameters())
    found = torch.autograd.grad(y, wanted, dy, retain_graph=True)
    assert all(map(torch.equal, found, torch.autograd.grad(y, wanted, dy)))


@pytest.mark.parametrize("maker", [make_cn, make_weighing, make_cnx])
@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_are_those_of_the_formulas(maker, training):
    layer = maker(6, 4, PRIORS, torch.float32).train(training)
    labels, (x, dy) = as_labels(LABELS), make()

    def differentiate(layer, x, dy):
        wanted = [x, *layer.parameters()]
        first = torch.autograd.grad(layer(x, labels), wanted, dy, create_graph=True)
        penalty = sum((t * t).sum() for t in first)
        return *first, *torch.autograd.grad(penalty, wanted, allow_unused=True)

    found = differentiate(copy.deepcopy(layer), x, dy)
    # In float64, which these kernels leave to torch's operators.
    expected = differentiate(layer.double(), x.detach().double().requires_grad_(), dy.double())
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, 1e-5)


def test_statistics_of_all_processes_are_moved_as_those_of_one(monkeypatch):
    layer = make_cn(6, 4, PRIORS, torch.float32).train()
    other, labels, (x, dy) = copy.deepcopy(layer), as_labels(LABELS), make()
    expected = torch.autograd.grad(layer(x, labels), [x], dy)[0]
    monkeypatch.setattr(cn_layer, "sum_over_ddp", lambda: lambda t: t)
    assert torch.equal(torch.autograd.grad(other(x, labels), [x], dy)[0], expected)
    for a, b in zip(layer.buffers(), other.buffers(), strict=True):
        assert_close(a, b, 1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("maker", [make_cn, make_weighing])
def test_checkpointing_changes_nothing(maker, reentrant):
    layer = maker(6, 4, PRIORS, torch.float32).train()
    other, labels, (x, dy) = copy.deepcopy(layer), as_labels(LABELS), make()
    # A product before it: what is computed again is another x.
    expected = torch.autograd.grad(layer(2 * x, labels).relu_(), [x], dy)[0]
    y = checkpoint(lambda t: other(2 * t, labels).relu_(), x, use_reentrant=reentrant)
    y.backward(dy)
    assert torch.equal(x.grad, expected)
    for a, b in zip(layer.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", ["selfnorm", "crossnorm"])
def test_other_methods_use_the_passes(kind, layout, monkeypatch):
    layer = (
        normswap.SelfNorm(6, 1, "paper").to(DEVICE)
        if kind == "selfnorm"
        else normswap.CrossNorm(p=1.0)
    )
    x, dy = make(layout=layout)

    def run():
        torch.manual_seed(0)
        y = copy.deepcopy(layer)(x)
        return y, *torch.autograd.grad(y, [x], dy)

    found = run()
    monkeypatch.setenv("NORMSWAP_TRITON", "0")
    for a, b in zip(found, run(), strict=True):
        assert_close(a, b, 1e-5)


@triton.jit
def _ends(out, C, M, sn, sm, sc, S, PART, BM: tl.constexpr, BC: tl.constexpr):
    """Write where a program starts to read, and how far its tile reaches."""
    _, _, _, _, _, first, within = tile.place(C, M, sn, sm, sc, S, PART, BM, BC)
    tl.store(out + 2 * tl.program_id(0), first)
    tl.store(out + 2 * tl.program_id(0) + 1, tl.max(within))


@pytest.mark.parametrize("last", [True, False])
def test_offsets_beyond_int32(last):
    channels, positions, parts, rows, columns = 6, 2**29, 2, 4, 4
    across, down = (1, channels) if last else (positions, 1)
    part = positions // parts
    strides = (channels * positions, down, across)
    out = torch.zeros(2 * parts * 2, 2, dtype=torch.int64, device=DEVICE)
    geometry = (channels, positions, *strides, parts, part)
    launch(_ends, len(out), out, *geometry, BM=rows, BC=columns)
    expected = [
        [n * channels * positions + s * part * down + c * across, 3 * down + 3 * across]
        for n in range(2)
        for s in range(parts)
        for c in (0, columns)
    ]
    assert max(expected)[0] > 2**32
    assert out.tolist() == expected
