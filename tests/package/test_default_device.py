"""What is computed on the host stays there where the caller has set another default device.

Here that is the meta device, which has no values; on a GPU the host's generators would be refused.
"""

import pytest
import torch
from torch import nn

import normswap
from normswap import contexts, plot
from normswap.testing.models import make_inputs, make_model

BASE, WINDOWS = make_model(), make_model("Windows")
IMAGES, PATCHED = make_inputs(BASE), make_inputs(WINDOWS)
LABELS = torch.tensor([0, 1, 0, 1, 1, 0])
BATCHES = list(torch.rand(60, 3, 4, 4).split(30))


@pytest.fixture(autouse=True)
def other_default():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("method", normswap.methods())
def test_a_model_is_converted_trained_and_saved(method, tmp_path):
    labelled = normswap.get_method(method).needs_context
    given = {"contexts": 2} if labelled else {}
    model = normswap.convert(BASE, method, **given, example_inputs=IMAGES).train()
    x = IMAGES.clone().requires_grad_()
    model(x, **({"context": LABELS} if labelled else {})).square().sum().backward()
    assert x.grad.isfinite().all()
    normswap.save(model, tmp_path)
    loaded = normswap.load(BASE, tmp_path).eval()
    torch.testing.assert_close(loaded(IMAGES), model.eval()(IMAGES), rtol=0, atol=0)


def test_rows_are_measured():
    model = normswap.convert(WINDOWS, "cn", contexts=2)
    each = [model(x[None], context=label) for x, label in zip(PATCHED, LABELS, strict=True)]
    torch.testing.assert_close(model(PATCHED, context=LABELS), torch.cat(each))
    assert [row.rows for row in normswap.summary(model).rows] == ["folded x4"]


def test_a_model_that_states_its_input_size_is_verified():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, device="cpu"), nn.BatchNorm2d(4, device="cpu"))
    model.default_cfg = {"input_size": (3, 8, 8)}
    assert normswap.summary(normswap.convert(model, "cn")).verification.largest < 1e-5


def test_mixtures_are_calibrated():
    model = normswap.convert(BASE, "acn")
    assert all(change >= 0 for change in normswap.calibrate(model, [IMAGES], samples=20).values())


@pytest.mark.filterwarnings("ignore::normswap.ContextWarning")
@pytest.mark.parametrize("samples", [20, 100])
@pytest.mark.parametrize("fit", [contexts.kmeans, contexts.gaussian_mixture])
def test_clusters_are_found(fit, samples):
    assigner = fit(BATCHES, 2, samples=samples, progress=False)
    assert sum(assigner.sizes) == 60
    assert set(assigner(BATCHES[0]).tolist()) <= {0, 1}


@pytest.mark.filterwarnings("ignore::normswap.ContextWarning")
def test_labels_are_read(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "image.png").touch()
    folders = contexts.from_folders(tmp_path)
    columns = contexts.from_columns([{"a": 1}, {"a": 2}], "a")
    classes = contexts.from_superclasses({"cat": "animal", "car": "thing"})
    found = folders(folders.paths), folders.labels, columns.labels, classes(["cat", "car"])
    assert [labels.tolist() for labels in found] == [[0, 1]] * 4
    assert [assigner.sizes for assigner in (folders, columns)] == [(1, 1)] * 2


def test_pictures_are_drawn(tmp_path):
    model = normswap.convert(BASE, "cn", contexts=2)
    plot.divergence(model, path=tmp_path / "divergence.png")
    plot.densities(model, [IMAGES], "neck", progress=False, path=tmp_path / "densities.png")
    plot.firing(normswap.convert(BASE, "crossnorm"), path=tmp_path / "firing.png")
