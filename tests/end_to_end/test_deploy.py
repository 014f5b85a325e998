"""Exported programs equal eager: torch.export, ONNX, AOTInductor, with the context as an input."""

import io

import pytest
import timm
import torch
from torch import nn

import normswap
from recipes.common.weights import load_efficientnet_lite0
from tests.support.models import ConvNet, Windows
from tests.support.sampling import sampled

CASES = {
    "cn": {"method": "cn"},
    "cn posterior": {"method": "cn", "unknown": "posterior"},
    "cn one context's": {"method": "cn", "unknown": "1"},
    "cn-x": {"method": "cn-x"},
    "cn-x posterior": {"method": "cn-x", "unknown": "posterior"},
    "acn": {"method": "acn"},
    "acn instance": {"method": "acn", "assignment": "instance"},
    "acn position": {"method": "acn", "assignment": "position"},
    "selfnorm": {"method": "selfnorm"},
    "crossnorm": {"method": "crossnorm"},
    "cnsn": {"method": "cnsn"},
}
# Exporting to ONNX takes seconds; the backbone below is one of "cn" with labels.
ONNX = [("cn-x", True), ("cn", True), ("cnsn", False), ("cn posterior", False), ("acn", False)]
LABELS = torch.tensor([0, 1, 2, -1, 1])


def make(case, net=ConvNet):
    settings = dict(CASES[case])
    if normswap.get_method(settings["method"]).needs_context:
        settings["contexts"] = 3
    model = normswap.convert(net(), verify=False, **settings).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
    return model


def arguments_for(model, labelled, count=5):
    x = torch.randn(count, *ConvNet.shape, generator=torch.Generator().manual_seed(count))
    return (x, LABELS.repeat(2)[:count]) if labelled else (x,)


def dynamic(arguments):
    return tuple({0: torch.export.Dim("batch", min=1, max=64)} for _ in arguments)


def is_labelled(case):
    return normswap.get_method(CASES[case]["method"]).needs_context


# "cnsn" exports the layers of both SelfNorm and CrossNorm; the contract exports each method, labels
# with "posterior" too, and the backbone below is one of "cn" with labels.
FIRST = [("cn posterior", False), ("cn-x", True), ("acn", False), ("cnsn", False)]
EACH = [(case, labelled) for case in CASES for labelled in {is_labelled(case), False}]
OTHERS = [pair for pair in EACH if pair not in FIRST]


@pytest.mark.parametrize(("case", "labelled"), sampled(FIRST + OTHERS, len(FIRST)))
def test_an_exported_program_equals_eager_for_any_batch(case, labelled):
    model = make(case)
    given = arguments_for(model, labelled)
    program = torch.export.export(model, given, dynamic_shapes=dynamic(given)).module()
    for count in (1, 5, 8):
        other = arguments_for(model, labelled, count)
        torch.testing.assert_close(program(*other), model(*other))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("method", "norm"),
    [
        ("cn", nn.InstanceNorm2d),
        ("efdmix", nn.BatchNorm2d),
        ("mixstyle", nn.BatchNorm2d),
        ("selfnorm", nn.BatchNorm2d),
    ],
)
def test_a_norm_exports_for_any_batch_in_both_modes(method, norm, training):
    labelled = normswap.get_method(method).needs_context
    settings = {"contexts": 3} if labelled else {"placement": "norm"}
    model = normswap.convert(nn.Sequential(norm(3)), method, verify=False, **settings)
    given, other = arguments_for(None, labelled), arguments_for(None, labelled, 8)
    if labelled:  # -1 gets running statistics in training, which the first of two runs moves
        given[1].clamp_(min=0), other[1].clamp_(min=0)
    program = torch.export.export(model.train(training), given, dynamic_shapes=dynamic(given))
    actual = program.module()(*other)
    assert len(actual) == 8
    if labelled or not training:
        torch.testing.assert_close(actual, model(*other))


def test_a_program_that_folds_windows_takes_any_batch():
    model = make("cn", Windows)
    given = (torch.randn(5, *Windows.shape), LABELS)
    with pytest.raises(normswap.ContextError, match="run the whole model in this mode"):
        torch.export.export(model, given, dynamic_shapes=dynamic(given))
    model(*given)
    program = torch.export.export(model, given, dynamic_shapes=dynamic(given)).module()
    for count in (2, 5, 8):
        other = torch.randn(count, *Windows.shape), LABELS.repeat(2)[:count]
        torch.testing.assert_close(program(*other), model(*other))


def test_a_label_that_is_no_context_is_an_error_in_an_exported_program():
    given = arguments_for(None, True)
    program = torch.export.export(make("cn"), given).module()
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        program(given[0], torch.tensor([0, 1, 3, 0, 0]))


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:# The axis name:UserWarning"
)
@pytest.mark.parametrize(("case", "labelled"), sampled(ONNX, 1))
def test_onnxruntime_equals_eager_for_any_batch(case, labelled):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = make(case)
    given = arguments_for(model, labelled)
    program = torch.onnx.export(
        model, given, dynamo=True, dynamic_shapes=dynamic(given), verbose=False
    )
    file = io.BytesIO()
    program.save(file)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    inputs = {i.name: i.type for i in session.get_inputs()}
    assert inputs == {"x": "tensor(float)"} | ({"context": "tensor(int64)"} if labelled else {})
    for count in (1, 5, 8):
        other = arguments_for(model, labelled, count)
        feeds = {name: t.numpy() for name, t in zip(inputs, other, strict=True)}
        (actual,) = session.run(None, feeds)
        torch.testing.assert_close(torch.from_numpy(actual), model(*other), atol=1e-5, rtol=1e-4)
    if labelled:
        feeds["context"][0] = 3
        with pytest.raises(runtime.capi.onnxruntime_pybind11_state.InvalidArgument):
            session.run(None, feeds)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:# The axis name:UserWarning"
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["cn", "acn position"])
def test_the_exporter_by_tracing_equals_eager_for_any_labels(case):
    runtime = pytest.importorskip("onnxruntime")
    model, file, labelled = make(case), io.BytesIO(), is_labelled(case)
    given = arguments_for(model, labelled)
    torch.onnx.export(model, given, file, dynamo=False)
    session = runtime.InferenceSession(file.getvalue())
    names = [entry.name for entry in session.get_inputs()]
    for labels in (LABELS, LABELS.flip(0), torch.full((5,), -1)) if labelled else [None]:
        feeds = (given[0],) if labels is None else (given[0], labels)
        (found,) = session.run(None, dict(zip(names, (t.numpy() for t in feeds), strict=True)))
        torch.testing.assert_close(torch.from_numpy(found), model(*feeds), rtol=1e-4, atol=1e-5)


def test_a_pretrained_backbone_exports_once_to_a_program_and_to_onnx():
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    base = timm.create_model("tf_efficientnet_lite0")
    base.load_state_dict(load_efficientnet_lite0(), strict=False)
    # Exporting takes its time for each block; those after these repeat them.
    blocks = [stage[0] for stage in base.blocks[:2]]
    body = nn.Sequential(base.conv_stem, base.bn1, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = normswap.convert(body, "cn", contexts=3, verify=False).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, normswap.ContextNorm):
                for t in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                    t.mul_(1 + 0.1 * torch.rand(t.shape, generator=generator))
    given = torch.randn(5, 3, 64, 64, generator=generator), LABELS
    exported = torch.export.export(model, given, dynamic_shapes=dynamic(given))
    file = io.BytesIO()
    torch.onnx.export(exported, dynamo=True, verbose=False).save(file)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    assert len(names) == 2
    exported = exported.module()
    for count in (1, 5):
        images = torch.randn(count, 3, 64, 64, generator=generator)
        with torch.no_grad():
            expected = model(images, context=LABELS[:count])
            other = model(images, context=(LABELS[:count] + 1) % 3)
            # Relative to the spread of the features, which the contexts move.
            tolerance = 1e-4 * float(expected.std())
            assert float((expected - other).abs().max()) > 100 * tolerance
            program = exported(images, LABELS[:count])
        feeds = dict(zip(names, (images.numpy(), LABELS[:count].numpy()), strict=True))
        (actual,) = session.run(None, feeds)
        for found in (program, torch.from_numpy(actual)):
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=1e-4)


@pytest.mark.exhaustive
def test_a_package_compiled_ahead_of_time_equals_eager(tmp_path):
    model = make("cn posterior", lambda: ConvNet().stem)
    given = arguments_for(model, True)
    with torch.no_grad():
        program = torch.export.export(model, given, dynamic_shapes=dynamic(given))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        package = torch._inductor.aoti_load_package(path)
        for count in (1, 5, 8):
            other = arguments_for(model, True, count)
            torch.testing.assert_close(package(*other), model(*other), atol=1e-5, rtol=1e-4)
