"""torchvision's detectors: a context for each image of the list that they take.

python -m recipes.examples.torchvision_detection
"""

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, box_iou

import normswap

CAMERAS = ["day", "thermal"]


def scene(index):
    """Return an image with a bright square (class 1) or a dim one (2), its target, its camera."""
    kind, camera = index % 2 + 1, CAMERAS[index // 2 % 2]
    draw = torch.Generator().manual_seed(index)
    left, top, size = torch.randint(16, 32, (3,), generator=draw).tolist()
    image = 0.1 * torch.rand(3, 64, 64, generator=draw) + 0.2
    image[:, top : top + size, left : left + size] += 0.6 / kind
    box = torch.tensor([[left, top, left + size, top + size]]).float()
    target = {"boxes": box, "labels": torch.tensor([kind])}
    return (1 - image if camera == "thermal" else image), target, camera


def detector():
    """Return a small Faster R-CNN, in place of one of torchvision's own."""
    backbone = nn.Sequential()
    for inputs, outputs in ((3, 16), (16, 32), (32, 32)):
        backbone.extend([nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()])
    backbone.out_channels = 32
    anchors = AnchorGenerator(((16, 24),), ((1.0,),))
    pool = MultiScaleRoIAlign(["0"], output_size=5, sampling_ratio=2)
    sizes = {"min_size": 64, "max_size": 64, "box_batch_size_per_image": 32}
    return FasterRCNN(backbone, 3, rpn_anchor_generator=anchors, box_roi_pool=pool, **sizes)


@torch.no_grad()
def share_found(model):
    """Return the share of new scenes whose surest box is right, the camera known."""
    images, targets, cameras = zip(*map(scene, range(1000, 1060)), strict=True)
    right = 0
    for found, target in zip(model.eval()(images, context=cameras), targets, strict=True):
        overlap = box_iou(found["boxes"][:1], target["boxes"])[:, 0]
        right += ((found["labels"][:1] == target["labels"]) & (overlap > 0.5)).sum().item()
    return right / len(images)


def main(folder="runs/examples/detection"):
    """Train, save and load; return the loaded model and the share of boxes it finds."""
    torch.manual_seed(0)
    original = detector()
    # Norms of box heads, as of fasterrcnn_resnet50_fpn_v2, stay as they are.
    model = normswap.convert(original, "cn", contexts=CAMERAS).train()
    optimizer = torch.optim.AdamW(normswap.param_groups(model, lr=0.003, weight_decay=0.01))
    loader = DataLoader(list(map(scene, range(240))), 12, shuffle=True, collate_fn=list)
    for epoch in range(5):
        for images, targets, cameras in (zip(*rows, strict=True) for rows in loader):
            loss = sum(model(images, targets, context=cameras).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}")

    normswap.save(model, Path(folder) / "norms")
    loaded = normswap.load(original, Path(folder) / "norms")
    score = share_found(loaded)
    print(f"{score:.3f} of the boxes found, after loading {folder}/norms")
    return loaded, score


if __name__ == "__main__":
    main()
