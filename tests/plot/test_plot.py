"""Pictures: what they show, and that they leave the rest of the program alone."""

import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.distributions import Normal

import normswap
from normswap import ConversionError, NormswapError, plot
from normswap.plot import Components
from tests.support.models import make_inputs, make_model

NAMES = ["photo", "sketch", "art"]


def converted(method="cn", **keywords):
    """A converted model whose contexts have moved apart."""
    model = make_model()
    given = {} if method in ("acn", "crossnorm") else {"contexts": NAMES}
    model = normswap.convert(model, method, example_inputs=make_inputs(model), **given, **keywords)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_mean", "mu")):
            tensor.add_(torch.randn(tensor.shape, generator=generator))
    return model


def image_of(figure):
    (image,) = figure.axes[0].get_images()
    return torch.as_tensor(image.get_array().data)


def reference_divergence(mean, var, priors):
    """KL of each context from the pooled Gaussian, by torch, averaged over channels."""
    pooled = (priors[:, None] * mean).sum(0)
    spread = (priors[:, None] * (var + (mean - pooled) ** 2)).sum(0)
    whole = Normal(pooled, spread.sqrt())
    each = [
        torch.distributions.kl_divergence(Normal(m, v.sqrt()), whole)
        for m, v in zip(mean, var, strict=True)
    ]
    return torch.stack([kl.mean() for kl in each])


def test_the_heat_map_shows_each_layers_divergence():
    model = converted(priors=[0.5, 0.3, 0.2])
    figure = plot.divergence(model)
    table = image_of(figure)
    assert table.shape == (4, 3)
    norms = ["stem.1", "blocks.0.bn", "blocks.1.bn", "neck"]
    for row, name in zip(table, norms, strict=True):
        norm = model.get_submodule(name)
        mean, var = norm.running_mean.double(), norm.running_var.double()
        expected = reference_divergence(mean, var, torch.tensor([0.5, 0.3, 0.2]).double())
        assert torch.allclose(row, expected, rtol=1e-6)
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == norms
    assert [tick.get_text() for tick in axes.get_xticklabels()] == NAMES


@pytest.mark.parametrize("method", ["cn", "cn-x", "acn"])
def test_every_method_with_statistics_has_a_heat_map(method, tmp_path):
    figure = plot.divergence(converted(method), path=tmp_path / "map.png")
    assert image_of(figure).shape == (4, 3)
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_all_is_zero_at_conversion():
    model = make_model()
    model = normswap.convert(model, "cn", contexts=2, example_inputs=make_inputs(model))
    assert float(image_of(plot.divergence(model)).max()) == 0


def test_divergences_may_be_given():
    rows = {f"layer{k}": torch.tensor([0.1 * k, 0.0]) for k in range(300)}
    figure = plot.divergence(rows, names=["a", "b"], title="mine")
    assert figure.axes[0].get_title() == "mine"
    assert len(figure.axes[0].get_yticklabels()) <= 120


@pytest.mark.parametrize(
    ("source", "keywords", "message"),
    [
        (nn.Linear(2, 2), {}, "expected a converted model, got Linear"),
        ({}, {}, "one value a context"),
        ({"a": torch.zeros(2), "b": torch.zeros(3)}, {}, "one value a context"),
        ({"a": torch.tensor([float("nan")])}, {}, r"finite divergences of 0 or more.*\['a'\]"),
        ({"a": torch.tensor([-1.0])}, {}, "finite divergences of 0 or more"),
        ({"a": torch.ones(1), "b": torch.tensor([torch.inf])}, {}, r"finite.*\['b'\]"),
        (None, {}, "expected a converted model, or a mapping .*, got NoneType"),
        ({"a": torch.zeros(2)}, {"names": ["x"]}, "expected 2 names"),
    ],
)
def test_what_has_no_divergence_is_refused(source, keywords, message):
    with pytest.raises(ConversionError, match=message):
        plot.divergence(source, **keywords)


def test_methods_without_statistics_are_refused():
    model = make_model("Instance")
    model = normswap.convert(model, "cn", contexts=2, example_inputs=make_inputs(model))
    with pytest.raises(ConversionError, match="no layer of this model has statistics"):
        plot.divergence(model)
    with pytest.raises(ConversionError, match="no layer of this model has statistics"):
        plot.divergence(converted("crossnorm"))


@pytest.mark.parametrize("offset", [0, 1e9])
def test_densities_are_weighted_gaussians_and_their_sum(offset):
    weight, sigma = torch.tensor([[0.3], [0.7]]), torch.tensor([[0.5], [1.5]])
    mean = torch.tensor([[-1.0], [2.0]], dtype=torch.float64) + offset
    figure = plot.densities(Components(weight, mean, sigma, ("left", "right")), None)
    total, *each = figure.axes[0].get_lines()
    x = torch.tensor(total.get_xdata())
    assert len(x.unique()) == len(x)
    expected = [
        w * Normal(m, s).log_prob(x).exp() for w, m, s in zip(weight, mean, sigma, strict=True)
    ]
    for line, values in zip(each, expected, strict=True):
        assert torch.allclose(torch.tensor(line.get_ydata()), values.double(), atol=1e-6)
    assert torch.allclose(torch.tensor(total.get_ydata()), sum(expected).double(), atol=1e-6)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["sum", "left: 30 %", "right: 70 %"]


def test_the_histogram_is_of_the_inputs_of_the_layer():
    """Its bars hold nearly all of a standard normal channel, and are as high as its density."""
    model = nn.Sequential(nn.BatchNorm1d(2))
    model = normswap.convert(model, "acn", example_inputs=torch.randn(4, 2)).train()
    generator = torch.Generator().manual_seed(0)
    loader = [torch.randn(1000, 2, generator=generator) for _ in range(20)]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    figure = plot.densities(model, loader, "0", channels=[1], samples=8000)
    bars = figure.axes[0].patches
    area = sum(bar.get_height() * bar.get_width() for bar in bars)
    assert 0.985 < area <= 1
    assert max(bar.get_height() for bar in bars) == pytest.approx(0.4, rel=0.15)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model[0]._forward_pre_hooks


def test_channels_are_those_whose_components_are_furthest_apart():
    mean = torch.zeros(2, 5)
    mean[1, [1, 4]] = 8.0
    parts = Components(torch.full((2, 5), 0.5), mean, torch.ones(2, 5))
    figure = plot.densities(parts, torch.randn(50, 5), channels=2)
    assert [axes.get_title() for axes in figure.axes] == ["channel 1", "channel 4"]


@pytest.mark.parametrize("method", ["cn", "cn-x", "acn"])
def test_every_method_with_statistics_has_densities(method):
    model = converted(method)
    figure = plot.densities(model, [make_inputs(model)], "blocks.0.bn", channels=99)
    assert len(figure.axes) == 4


@pytest.mark.parametrize(
    ("layer", "loader", "keywords", "message"),
    [
        ("head", None, {}, r"got 'head'; the layers are: stem\.1, blocks\.0\.bn"),
        ("neck", [], {}, "no batch reached neck"),
        ("neck", None, {"channels": [9]}, r"expected channels in \[0, 4\), got \[9\]"),
        ("neck", None, {"channels": 0}, "at least one channel"),
    ],
)
def test_densities_of_nothing_are_refused(layer, loader, keywords, message):
    model = converted("acn")
    data = [make_inputs(model)] if loader is None else loader
    with pytest.raises(ConversionError, match=message):
        plot.densities(model, data, layer, **keywords)


def test_activations_that_are_not_finite_are_refused():
    parts = Components(torch.ones(1, 2), torch.zeros(1, 2), torch.ones(1, 2))
    with pytest.raises(ConversionError, match="expected finite values"):
        plot.densities(parts, torch.tensor([[1.0, float("nan")]]))


def test_the_recorded_firings_are_those_of_the_forwards():
    """A place that fires rewrites its input; hooks see which did."""
    model = converted("crossnorm", p=0.7).train()
    sites = [m for m in model.modules() if type(m).__name__ == "CrossNorm"]
    rows = []
    for index, site in enumerate(sites):
        site.register_forward_hook(
            lambda _, given, out, index=index: rows[-1].add(index) if out is not given[0] else None
        )
    with plot.record_firing(model) as record:
        for _ in range(40):
            rows.append(set())
            model(make_inputs(model))
    assert record.rows == rows
    assert any(rows)
    model(make_inputs(model))
    assert len(record.rows) == 40


def test_recording_changes_no_draw():
    outputs = []
    for watched in (True, False):
        model = converted("crossnorm").train()
        torch.manual_seed(7)
        if watched:
            with plot.record_firing(model):
                outputs.append([model(make_inputs(model)) for _ in range(8)])
        else:
            outputs.append([model(make_inputs(model)) for _ in range(8)])
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))


def test_forwards_in_eval_are_no_forwards_in_training():
    model = converted("crossnorm").eval()
    with plot.record_firing(model) as record:
        model(make_inputs(model))
    with pytest.raises(ConversionError, match="got an empty one"):
        plot.firing(record)


def test_a_models_schedule_is_drawn_from_without_touching_random_state():
    model = converted("crossnorm", p=1.0)
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    figure = plot.firing(model, forwards=30)
    assert torch.equal(torch.rand(2), expected)
    table = image_of(figure)
    assert table.shape == (2, 30)
    assert (table.sum(0) == 1).all()


def test_firing_needs_crossnorm():
    with pytest.raises(ConversionError, match="method='crossnorm' or 'cnsn'"):
        plot.firing(converted("cn"))


def test_curves_have_a_panel_a_quantity_and_share_colours():
    panels = {
        "loss": {"bn": [2.0, 1.0], "cn": [2.0, None]},
        "accuracy, %": {"bn": [50, 60], "cn, label known": [55, 65], "cn, label unknown": [40, 50]},
    }
    figure = plot.curves(panels, log=["loss"], title="run")
    left, right = figure.axes
    assert left.get_yscale() == "log"
    assert [axes.get_ylabel() for axes in figure.axes] == list(panels)
    colours = [line.get_color() for line in right.get_lines()]
    assert colours[1] == colours[2] == left.get_lines()[1].get_color() != colours[0]
    assert [line.get_linestyle() for line in right.get_lines()] == ["-", "-", "--"]


@pytest.mark.parametrize(
    "panels", [{}, {"a": {}}, {"a": {"b": []}}, {"a": {"b": [1], "c": [1, 2]}}]
)
def test_curves_of_different_lengths_or_none_are_refused(panels):
    with pytest.raises(NormswapError, match="expected curves of one length"):
        plot.curves(panels)


def test_axes_of_the_caller_are_drawn_in():
    figure = Figure()
    first, second = figure.subplots(1, 2)
    assert plot.divergence({"a": torch.zeros(2)}, ax=first) is figure
    assert plot.curves({"loss": {"bn": [1, 2]}}, ax=second) is figure
    assert plot.firing(converted("crossnorm"), ax=figure.add_subplot()) is figure
    with pytest.raises(NormswapError, match="expected ax= with 2 axes, one a panel, got 1"):
        plot.curves({"a": {"x": [1]}, "b": {"x": [1]}}, ax=first)


@pytest.mark.parametrize(
    ("path", "message"),
    [("map.txt", "an ending among"), ("map", "an ending among"), ("none/map.png", "there is no")],
)
def test_a_path_that_cannot_be_written_is_refused(tmp_path, path, message):
    with pytest.raises(NormswapError, match=message):
        plot.divergence({"a": torch.zeros(2)}, path=tmp_path / path)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(NormswapError, match=r"pip install 'normswap\[plot\]'"):
        plot.curves({"a": {"x": [1]}})


def test_pyplot_is_not_imported_and_the_backend_stays():
    code = (
        "import sys, torch, normswap; normswap.plot.divergence({'a': torch.zeros(2)}); "
        "import matplotlib; print('matplotlib.pyplot' in sys.modules, "
        "matplotlib.rcParams._get_backend_or_none())"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["False", "None"]
