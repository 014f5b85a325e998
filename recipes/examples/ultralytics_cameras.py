"""Ultralytics' own trainer: the camera of an image is in its file's name; then each is exported.

pip install ultralytics && python -m recipes.examples.ultralytics_cameras
"""

from pathlib import Path

import torch
from torchvision.io import write_png
from ultralytics.models.yolo.detect import DetectionTrainer

import normswap

CAMERAS = ["day", "thermal"]
BACKBONE = [[-1, 1, "Conv", [width, 3, 2]] for width in (16, 32, 64)]
MODEL = {"nc": 1, "backbone": BACKBONE, "head": [[[2], 1, "Detect", ["nc"]]]}  # or yolo11n.yaml


class Trainer(DetectionTrainer):
    def get_model(self, cfg=None, weights=None, verbose=True):
        model = super().get_model(cfg, weights, verbose)
        model = normswap.convert(model, "cn", contexts=CAMERAS)
        if weights is not None:
            model.load(weights)  # again: of a run that is resumed, what its contexts learned
        return model

    def get_dataloader(self, path, batch_size=16, rank=0, mode="train"):
        loader = super().get_dataloader(path, batch_size, rank, mode)
        own = type(loader)

        def with_cameras(loader):
            for batch in own.__iter__(loader):
                cameras = [Path(file).stem.split("-")[0] for file in batch["im_file"]]
                with normswap.use_context(self.model if mode == "train" else self.ema.ema, cameras):
                    yield batch

        loader.__class__ = type("Labelled", (own,), {"__iter__": with_cameras})
        return loader


def write_scenes(folder):
    """Write scenes with a bright square, thermal ones inverted, and what describes them."""
    for kind in ("images/train", "images/val", "labels/train", "labels/val"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for index in range(128):
        name = f"{'train' if index < 96 else 'val'}/{CAMERAS[index % 2]}-{index}"
        left, top, size = torch.randint(16, 32, (3,)).tolist()
        image = torch.randint(40, 80, (3, 64, 64), dtype=torch.uint8)
        image[:, top : top + size, left : left + size] += 120
        write_png(255 - image if index % 2 else image, f"{folder}/images/{name}.png")
        box = f"0 {(left + size / 2) / 64} {(top + size / 2) / 64} {size / 64} {size / 64}"
        (folder / f"labels/{name}.txt").write_text(box)
    parts = {"train": "images/train", "val": "images/val", "names": ["square"]}
    for name, content in (("data", {"path": str(folder), **parts}), ("model", MODEL)):
        (folder / f"{name}.yaml").write_text(str(content))  # YAML reads it


def main(folder="runs/examples/ultralytics"):
    """Train, and export for each camera; return the averaged model and its mAP50."""
    write_scenes(folder := Path(folder).resolve())
    settings = {name: str(folder / f"{name}.yaml") for name in ("model", "data")}
    settings |= {"optimizer": "AdamW", "lr0": 0.01, "warmup_epochs": 0, "epochs": 14, "batch": 8}
    settings |= {"imgsz": 64, "workers": 0, "device": "cpu", "project": str(folder), "val": False}
    # Mosaic, as mixup, makes one image of several cameras, which no label is right for.
    trainer = Trainer(overrides={**settings, "mosaic": 0, "plots": False, "save": False})
    trainer.final_eval = lambda: None  # it fuses, which is for specialised models
    trainer.train()
    model, score = trainer.ema.ema.float().eval(), trainer.metrics["metrics/mAP50(B)"]
    x = torch.rand(2, 3, 64, 64)
    for camera in CAMERAS:
        plain = normswap.specialize(model, camera).fuse()  # of one camera: fuses and exports
        plain.model[-1].export = True
        torch.testing.assert_close(plain(x), model(x, context=camera)[0], rtol=0, atol=1e-3)
        torch.jit.trace(plain, x).save(folder / f"{camera}.pt")
    print(f"mAP50 {score:.3f}; exported to {folder}")
    return model, score


if __name__ == "__main__":
    main()
