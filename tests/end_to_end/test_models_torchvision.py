"""torchvision, one of each kind: function kept, labels followed, all norms found."""

import pytest
import torch

import normswap
from tests.support.behave import randomize, separate, tensors
from tests.support.sampling import sampled

models = pytest.importorskip("torchvision.models")

LABELS = torch.tensor([2, 0])


def _images(*shape):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def _detect(name, **kwargs):
    build = getattr(models.detection, name)
    return build(weights=None, weights_backbone=None, num_classes=3, **kwargs)


IMAGE, VIDEO = (3, 64, 64), (3, 2, 16, 16)
SMALL_BOXES = {"rpn_post_nms_top_n_test": 5, "min_size": 64, "max_size": 64, "box_score_thresh": 0}
# name -> (how to build it, shape of a sample, what keeps its own forward).
KINDS = {
    "googlenet": (lambda: models.googlenet(init_weights=False), IMAGE, ("",)),
    "shufflenet_v2_x0_5": (lambda: models.shufflenet_v2_x0_5(), IMAGE, ()),
    "densenet": (
        lambda: models.DenseNet(8, (3, 2), 16),
        IMAGE,
        ("features.denseblock1", "features.denseblock2"),
    ),
    "deeplabv3": (
        lambda: models.segmentation.deeplabv3_mobilenet_v3_large(
            weights=None, weights_backbone=None, aux_loss=True
        ),
        IMAGE,
        ("", "backbone"),
    ),
    "r3d_18": (lambda: models.video.r3d_18(), VIDEO, ()),
    "fasterrcnn": (
        lambda: _detect("fasterrcnn_mobilenet_v3_large_320_fpn", **SMALL_BOXES),
        IMAGE,
        ("", "backbone.body"),
    ),
    # The first two are residual networks, as the video's is; the others are like the backbone
    # that "deeplabv3" and "fasterrcnn" have, and the sweep's tests check the last one too.
    "resnet18": (lambda: models.resnet18(), IMAGE, ()),
    "regnet_y_400mf": (lambda: models.regnet_y_400mf(), IMAGE, ()),
    "float of a quantisable one": (
        lambda: models.quantization.mobilenet_v2(weights=None, quantize=False),
        IMAGE,
        (),
    ),
    "mobilenet_v3_small": (lambda: models.mobilenet_v3_small(), IMAGE, ()),
    "lraspp": (
        lambda: models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None),
        IMAGE,
        ("", "backbone", "classifier"),
    ),
}


@pytest.mark.parametrize("name", sampled(KINDS, len(KINDS) - 5))
def test_a_mixed_batch_of_a_torchvision_model(name):
    build, shape, opaque = KINDS[name]
    torch.manual_seed(0)
    model = build().double().eval()
    randomize(model)
    images = _images(*shape).double()

    def run(converted, samples, **given):
        batch = list(samples) if name == "fasterrcnn" else samples
        with torch.no_grad():
            return tensors(converted(batch, **given))

    expected = run(model, images)
    converted = normswap.convert(model, "cn", contexts=3, verify=False)
    for given in ({}, {"context": LABELS}):
        torch.testing.assert_close(run(converted, images, **given), expected)
    separate(converted)
    mixed = run(converted, images, context=LABELS)
    parts = [run(converted, images[i : i + 1], context=LABELS[i : i + 1]) for i in range(2)]
    if name == "fasterrcnn":  # a dict for each image
        joined = [*parts[0], *parts[1]]
    else:
        joined = [torch.cat(pair) for pair in zip(*parts, strict=True)]
    torch.testing.assert_close(mixed, joined)
    other = run(converted, images, context=LABELS.flip(0))
    assert any(
        a.shape != b.shape or (a - b).abs().max() > 1e-3 for a, b in zip(mixed, other, strict=True)
    )
    report = normswap.summary(converted)
    assert {row.action for row in report.rows} == {"replaced"}
    assert tuple(report.opaque) == opaque


def test_optical_flow_normalises_two_images_at_once():
    torch.manual_seed(0)
    model = models.optical_flow.raft_small(weights=None).eval()
    randomize(model)
    first, second = _images(3, 128, 128).clamp(-1, 1), torch.rand(2, 3, 128, 128)
    converted = normswap.convert(model, "cn", contexts=3, verify=False)
    with torch.no_grad():
        expected = model(first, second, 1)[-1]
        actual = converted(first, second, 1, context=LABELS)[-1]
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
        separate(converted)
        mixed = converted(first, second, 1, context=LABELS)[-1]
        for i in range(2):
            part = slice(i, i + 1)
            alone = converted(first[part], second[part], 1, context=LABELS[part])[-1]
            torch.testing.assert_close(mixed[part], alone, rtol=1e-3, atol=1e-3)
