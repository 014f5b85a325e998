"""Converted models on the GPU against the same in float64 on the CPU; precisions; labels."""

import copy
import functools

import pytest
import timm
import torch

from normswap.errors import MissingContextError
from normswap.testing.case import LABELS, MIXED, NAMES, move
from normswap.testing.models import MODELS, make_inputs
from tests.gpu.steps import (
    EVERY,
    EVERY_LABELLED,
    LAYOUTS,
    SORTED,
    TRAINING,
    case_of,
    errors,
    labels_for,
    options_of,
    require_near,
    values_of,
    widen,
    without_gradients,
)

pytestmark = pytest.mark.gpu
SAMPLES = 24


@functools.cache
def residual(method, device_type, trained=True):
    """Return ResNet-18, converted unless the method is "", and inputs for it, in float64."""
    # The last maps have 25 positions: four, at 64 px, may be alike, and what divides by their
    # deviation (mixstyle, dsu) then loses all digits, by torch's operators as well.
    name, side = ("test_resnet", 32) if device_type == "cpu" else ("resnet18", 160)
    torch.manual_seed(0)
    base = timm.create_model(name, num_classes=7)
    x = torch.randn(SAMPLES, 3, side, side)
    if method:
        case = case_of(method)
        base = case.convert(base, verify=False, **options_of(case.method))
        base = move(base) if trained else base
    return widen(base), x


@EVERY
@TRAINING
@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_what_it_does_on_the_cpu(method, training, name, device):
    case = case_of(method)
    if name not in case.models:
        pytest.skip("the method changes nothing here")
    wide = widen(case.trained(name))
    model = copy.deepcopy(wide).to(device, torch.float32)
    x = make_inputs(model, SAMPLES).float()
    labels = labels_for(SAMPLES, MIXED) if case.labelled else None
    given = None if labels is None else labels.to(device)
    found = values_of(model, x.to(device), given, training)
    expected = values_of(wide, x.double(), labels, training)
    if method in SORTED:
        found, expected = without_gradients(found), without_gradients(expected)
    require_near(found, expected, 5e-4)


@EVERY
@TRAINING
@pytest.mark.parametrize("layout", LAYOUTS)
def test_resnet_computes_what_it_does_on_the_cpu(method, training, layout, device):
    wide, x = residual(method, device.type)
    wide = copy.deepcopy(wide)
    layout = LAYOUTS[layout]
    model = copy.deepcopy(wide).to(device, torch.float32, memory_format=layout)
    labels = labels_for(SAMPLES, LABELS) if case_of(method).labelled else None
    given = None if labels is None else labels.to(device)
    found = values_of(model, x.to(device, memory_format=layout), given, training)
    expected = values_of(copy.deepcopy(wide), x.double(), labels, training)
    narrow = values_of(wide.float(), x, labels, training)
    if method in SORTED:
        found, narrow, expected = map(without_gradients, (found, narrow, expected))
    # What sorts, or divides by an instance's deviation, loses digits in float32 on any device.
    require_near(found, expected, max(2e-3, 6 * max(errors(narrow, expected).values())))


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_loses_no_more_than_batch_norm_does(method, dtype, device):
    apart = []
    for name in ("", method):
        wide, x = residual(name, device.type, trained=False)
        wide, layout = copy.deepcopy(wide), torch.channels_last
        model = copy.deepcopy(wide).to(device, torch.float32, memory_format=layout)
        labelled = bool(name) and case_of(name).labelled
        labels = labels_for(SAMPLES, LABELS) if labelled else None
        given = None if labels is None else labels.to(device)
        scale = 2.0**10 if dtype == torch.float16 else 1.0
        low = x.to(device, memory_format=layout)
        found = values_of(model, low, given, True, autocast=dtype, scale=scale)
        assert all(value.isfinite().all() for value in found.values())
        apart.append(sorted(errors(found, values_of(wide, x.double(), labels, True)).values()))
    if method in SORTED:
        return
    # Contexts have a part of the batch each, so that their statistics carry more of the rounding;
    # augmentations divide by the deviation of one instance.
    most = 6 if case_of(method).method.stochastic else 3
    base, own = ([e[len(e) // 2], e[-1]] for e in apart)
    assert own[0] <= most * base[0], f"the median error is {own[0]:.2g}, batch norm's {base[0]:.2g}"
    assert own[1] <= most * base[1], (
        f"the largest error is {own[1]:.2g}, batch norm's {base[1]:.2g}"
    )


@EVERY
def test_a_gradient_scaler_steps(method, device):
    model, x = residual(method, device.type, trained=False)
    model = copy.deepcopy(model).to(device, torch.float32, memory_format=torch.channels_last)
    labelled = case_of(method).labelled
    given = {"context": labels_for(SAMPLES, LABELS).to(device)} if labelled else {}
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = copy.deepcopy(dict(model.named_parameters()))
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16):
            y = model.train()(x.to(device), **given)
        scaler.scale(y.float().logsumexp(1).mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**10, "a gradient overflowed"
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


@EVERY_LABELLED
def test_labels_in_every_form_are_the_same(method, device):
    model = case_of(method).trained().to(device, torch.float32).eval()
    x = make_inputs(model).to(device)
    indices = MIXED.tolist()
    forms = [
        indices,
        [NAMES[k] if k >= 0 else None for k in indices],
        MIXED.numpy(),
        MIXED.int().to(device),
    ]
    with torch.no_grad():
        expected = model(x, context=MIXED.to(device))
        for labels in forms:
            assert torch.equal(model(x, context=labels), expected), labels
        one = model(x, context=torch.ones(len(x), dtype=torch.int64, device=device))
        for labels in (1, NAMES[1], torch.tensor(1), torch.tensor(1, device=device)):
            torch.testing.assert_close(model(x, context=labels), one, rtol=1e-5, atol=1e-5)


@EVERY_LABELLED
def test_labels_on_the_host_serve_a_model_on_the_device(method, device):
    """A loader gives labels on the CPU; a name or a list is moved, and so are they."""
    model = case_of(method).trained().to(device, torch.float32).eval()
    x = make_inputs(model).to(device)
    with torch.no_grad():
        assert torch.equal(model(x, context=MIXED), model(x, context=MIXED.to(device)))


@EVERY_LABELLED
@pytest.mark.parametrize("unknown", ["pooled", "posterior", "b"])
@pytest.mark.parametrize("labels", [MIXED, torch.full((6,), -1), None], ids=["mixed", "-1", "none"])
def test_unknown_labels_get_what_they_do_on_the_cpu(method, unknown, labels, device):
    for name in case_of(method).models:
        wide = widen(case_of(method).trained(name, unknown=unknown))
        model = copy.deepcopy(wide).to(device, torch.float32)
        x = make_inputs(model)
        given = None if labels is None else labels.to(device)
        found = values_of(model, x.to(device), given, False)
        require_near(found, values_of(wide, x.double(), labels, False), 1e-4)


@EVERY_LABELLED
def test_unknown_labels_are_refused_where_they_are_an_error(method, device):
    model = case_of(method).trained(unknown="error").to(device, torch.float32).eval()
    x = make_inputs(model).to(device)
    assert model(x, context=LABELS.to(device)).isfinite().all()
    for labels in (MIXED.tolist(), None):
        with pytest.raises(MissingContextError):
            model(x, context=labels)
