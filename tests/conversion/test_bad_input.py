"""What cannot be converted is refused with a clear error, and the model stays as it was."""

import warnings

import numpy
import pytest
import torch
from torch import nn

import normswap
from normswap import ConversionError, UnknownNameError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.ln = nn.LayerNorm(4)

    def forward(self, x):
        return self.ln(self.bn(self.conv(x)).mean((2, 3)))


def describe(model):
    return [(n, type(m), vars(m).keys()) for n, m in model.named_modules()]


def refuses(model, match, **arguments):
    before = describe(model)
    with pytest.raises(ConversionError, match=match):
        normswap.convert(model, inplace=True, **arguments)
    assert describe(model) == before


def test_not_a_module():
    with pytest.raises(ConversionError, match=r"expected a torch.nn.Module, got list"):
        normswap.convert([])


def test_model_without_any_norm():
    refuses(nn.Sequential(nn.Linear(2, 2)), "none at all")


def test_model_without_a_convertible_norm_lists_each_with_its_reason():
    refuses(nn.Sequential(nn.LayerNorm(2)), r"LayerNorm is neither a batch nor .* \(0\)")


def test_selection_that_matches_nothing_lists_the_norms():
    refuses(Net(), r"1 BatchNorm2d: not selected \(bn\)", select="stage*")


def test_excluded_norms_are_named():
    refuses(Net(), "BatchNorm2d: excluded", exclude=nn.BatchNorm2d)


def test_selector_of_an_unknown_kind():
    refuses(Net(), "expected select= as a glob", select=3)


def test_scripted_model():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer releases of torch warn that script is deprecated
        scripted = torch.jit.script(Net())
    with pytest.raises(ConversionError, match=r"the model .* is scripted"):
        normswap.convert(scripted)


def test_compiled_model():
    with pytest.raises(ConversionError, match="is compiled; convert the original"):
        normswap.convert(torch.compile(Net()))


def test_model_compiled_in_place():
    model = Net()
    model.compile()
    refuses(model, "compiled in place")


def test_data_parallel_model():
    refuses(nn.DataParallel(Net()), r"wrapped for parallel training; convert \.module")


def test_traced_graph_module():
    refuses(torch.fx.symbolic_trace(Net()), "traced graph")


def test_obstacle_inside_the_model_is_named():
    refuses(nn.Sequential(nn.Identity(), nn.DataParallel(Net())), "its submodule 1")


def test_a_forward_that_holds_the_original_is_converted_in_place_only():
    model = nn.Sequential(Net())
    inner = model[0]
    inner.forward = lambda x: inner.bn(inner.conv(x))
    with pytest.raises(ConversionError, match=r"0\.forward .* inplace=True"):
        normswap.convert(model)
    converted = normswap.convert(model, contexts=2, inplace=True)
    converted.eval()(torch.randn(2, 3, 8, 8), context=torch.tensor([0, 1]))


def test_converting_twice():
    refuses(normswap.convert(Net()), "is converted already")


def test_float_stubs_for_later_quantisation_are_no_obstacle():
    class Stubbed(Net):
        def __init__(self):
            super().__init__()
            self.add = nn.quantized.FloatFunctional()

    assert isinstance(normswap.convert(Stubbed()).bn, normswap.ContextNormX)


def test_unknown_method_lists_the_methods():
    with pytest.raises(UnknownNameError, match="the choices are") as error:
        normswap.convert(Net(), "batchnorm")
    assert all(name in str(error.value) for name in normswap.methods())


def test_unknown_option_lists_the_options():
    refuses(
        Net(),
        r"unknown option colour for method 'cn'; its options: shrink, affine",
        method="cn",
        colour=1,
    )


@pytest.mark.parametrize(
    ("contexts", "match"),
    [
        (0, "at least one context"),
        ([], "at least one context"),
        (True, "as a count or a sequence"),
        (2.5, "as a count or a sequence"),
        ("photo", r"write \['photo'\]"),
        (["a", "a"], "names distinct"),
        ([1, 2], "names of contexts as strings, got 1 among them"),
        (numpy.array([3, 5]), "names of contexts as strings, got 3 among them"),
        (numpy.array([["a", "b"]]), r"as strings, got \['a', 'b'\] among them"),
        (numpy.float64(2), "as a count or a sequence"),
    ],
)
def test_bad_contexts(contexts, match):
    refuses(Net(), match, contexts=contexts)


def test_unknown_policy_lists_the_choices():
    with pytest.raises(UnknownNameError, match="error, pooled, posterior, photo, sketch"):
        normswap.convert(Net(), contexts=["photo", "sketch"], unknown="nearest")


@pytest.mark.parametrize(
    ("priors", "match"),
    [([0.5], "with 2 values"), ([1.0, 0.0], "positive"), ([1.0, float("nan")], "positive finite")],
)
def test_bad_priors(priors, match):
    refuses(Net(), match, contexts=2, priors=priors)


class Affine(nn.Module):
    """Holds what a frozen batch norm does, under another name."""

    def __init__(self):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(3))


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (nn.BatchNorm2d(3, track_running_stats=False), "no running statistics to start from"),
        (
            type("BatchNorm2d", (nn.BatchNorm2d,), {"forward": lambda self, x: x})(3),
            f"{__name__}.BatchNorm2d overrides the forward",
        ),
        (nn.GroupNorm(1, 3), "neither a batch nor an instance norm"),
        (Affine(), "the buffers of a frozen batch norm, but its class, Affine, is not known"),
        (
            type("InstanceNorm", (nn.Identity,), {})(),
            "InstanceNorm is neither a batch nor an instance norm of torch, torchvision or timm",
        ),
    ],
)
def test_norm_that_cannot_be_replaced_is_listed_with_its_reason(norm, reason):
    report = normswap.plan(nn.Sequential(nn.BatchNorm2d(3), norm))
    assert [row.action for row in report.rows] == ["replaced", "refused"]
    assert reason in report.rows[1].reason


def test_lazy_norm():
    refuses(nn.Sequential(nn.BatchNorm2d(3), nn.LazyBatchNorm2d()), "submodule 1 .* is lazy")


def test_parametrized_norm_is_refused():
    norm = nn.BatchNorm1d(3)
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity())
    refuses(nn.Sequential(norm), "parametrization")


def test_failing_example_inputs_leave_the_model_unchanged():
    model = Net()
    before = describe(model)
    with pytest.raises(ConversionError, match="the original model itself fails on example_inputs"):
        normswap.convert(model, inplace=True, example_inputs=torch.zeros(1, 5, 8, 8))
    assert describe(model) == before


def test_use_context_on_a_model_that_is_not_converted():
    with pytest.raises(ConversionError, match=r"call normswap\.convert first"):
        with normswap.use_context(Net(), 0):
            pass


def test_summary_of_a_model_that_is_not_converted():
    with pytest.raises(ConversionError, match=r"normswap\.plan to see"):
        normswap.summary(Net())


# The arguments of the other tools are in the table of `tests.support.arguments`.
TOOLS = {
    "verify": lambda m: normswap.verify(m, Net()),
    "divergence": normswap.plot.divergence,
    "densities": lambda m: normswap.plot.densities(m, []),
    "record_firing": lambda m: normswap.plot.record_firing(m).__enter__(),
}


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_what_is_no_model_is_refused(tool):
    for given in (None, 3, "resnet50", torch.zeros(2), Net, {}):
        with pytest.raises(normswap.NormswapError, match="expected"):
            tool(given)


def test_verify_takes_a_wrapped_model():
    base = Net()
    model = normswap.convert(base, "cn", contexts=2, verify=False)
    wrapped = torch.compile(model, backend="eager")
    assert normswap.verify(wrapped, base, torch.randn(2, 3, 8, 8)).differences


@pytest.mark.parametrize("loader", [None, 3, Net()], ids=["None", "int", "model"])
def test_a_loader_that_yields_nothing_is_refused(loader):
    model = normswap.convert(Net(), "cn", contexts=2, verify=False)
    for tool in (normswap.update_stats, lambda m, data: normswap.adapt(m, data, 0)):
        with pytest.raises(ConversionError, match="expected a loader"):
            tool(model, loader)
