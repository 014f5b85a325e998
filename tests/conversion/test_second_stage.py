"""Detectors whose second stage normalises regions: how many a sample has depends on the images."""

import pytest
import torch
from torch import nn

import normswap

detection = pytest.importorskip("torchvision.models.detection")


def make():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU())
    backbone.out_channels = 8
    anchors = detection.rpn.AnchorGenerator(((16, 24),), ((1.0,),))
    size = (8, 3, 3)
    head = detection.faster_rcnn.FastRCNNConvFCHead(size, [8], [8], norm_layer=nn.BatchNorm2d)
    pool = detection.faster_rcnn.MultiScaleRoIAlign(["0"], output_size=3, sampling_ratio=2)
    sizes = {"min_size": 64, "max_size": 64, "rpn_pre_nms_top_n_test": 40, "box_score_thresh": 0.0}
    parts = {"rpn_anchor_generator": anchors, "box_roi_pool": pool, "box_head": head}
    parts["box_predictor"] = detection.faster_rcnn.FastRCNNPredictor(8, 3)
    return detection.FasterRCNN(backbone, **parts, **sizes).eval()


IMAGES = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
BOXES = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1])}


def test_the_plan_says_that_the_norms_of_regions_stay():
    rows = {row.fqn: row for row in normswap.plan(make(), "cn", contexts=2).rows}
    assert rows["backbone.1"].action == "replaced"
    row = rows["roi_heads.box_head.0.1"]
    assert row.action == "kept"
    assert row.reason.startswith("its rows are regions that roi_heads pools")


def test_mixed_batches_run_and_equal_the_original():
    base = make()
    model = normswap.convert(base, "cn", contexts=2)
    found, expected = model(IMAGES, context=[0, 1, 0]), base(IMAGES)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one["scores"], other["scores"])
    losses = model.train()(IMAGES, [BOXES] * 3, context=[0, 1, 0])
    sum(losses.values()).backward()
    assert model.backbone[1].weight.grad.abs().sum(1).ne(0).all()


def test_a_norm_of_regions_that_is_selected_is_replaced():
    model = normswap.convert(make(), "cn", contexts=2, select="roi_heads.*")
    assert isinstance(model.roi_heads.box_head[0][1], normswap.ContextNorm)


def test_methods_without_labels_replace_the_norms_of_regions():
    rows = normswap.plan(make(), "acn").rows
    assert {row.action for row in rows} == {"replaced"}
