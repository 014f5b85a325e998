"""MONAI: a 3-d U-Net over volumes of several sites; windows get the label of their volume.

pip install monai
python -m recipes.examples.monai_sites
"""

from pathlib import Path

import torch
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.metrics import compute_dice
from monai.networks.nets import UNet
from monai.utils import set_determinism
from torch.utils.data import DataLoader

import normswap

SITES = ["t1", "t2"]


def volume(index, size=24):
    """Return a volume, its mask and its site: lesions are dark at t1, bright at t2, cysts not."""
    draw = torch.Generator().manual_seed(index)
    site = SITES[index % 2]
    image = 0.3 * torch.randn(1, size, size, size, generator=draw)
    grid = torch.stack(torch.meshgrid(*[torch.arange(size)] * 3, indexing="ij"))
    masks = []
    for brightness in (1, -1):
        centre = torch.randint(3, size - 3, (3, 1, 1, 1), generator=draw)
        masks.append(((grid - centre) ** 2).sum(0, keepdim=True) < 16)
        image[masks[-1]] += brightness
    return image, masks[site == "t1"].float(), site


def main(folder="runs/examples/monai"):
    """Train, save and load; return the loaded model and its Dice score on larger volumes."""
    set_determinism(0)
    original = UNet(3, 1, 1, channels=(8, 16, 16), strides=(2, 2), norm="batch")
    model = normswap.convert(original, "cn", contexts=SITES).train()
    optimizer = torch.optim.AdamW(normswap.param_groups(model, lr=0.01, weight_decay=0.01))
    criterion = DiceCELoss(sigmoid=True)
    loader = DataLoader(list(map(volume, range(64))), batch_size=8, shuffle=True)
    for epoch in range(9):
        for images, masks, sites in loader:
            loss = criterion(model(images, context=sites), masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}")

    normswap.save(model, Path(folder) / "norms")
    loaded = normswap.load(original, Path(folder) / "norms").eval()
    scores = []
    for index in range(1000, 1006):
        image, mask, site = volume(index, size=40)
        # One volume, many windows in a batch: one name holds for all of them.
        with torch.no_grad(), normswap.use_context(loaded, site):
            logits = sliding_window_inference(image[None], 24, 4, loaded)
        scores.append(compute_dice((logits > 0).float(), mask[None]).item())
    score = sum(scores) / len(scores)
    print(f"Dice {score:.3f} with windows, after loading {folder}/norms")
    return loaded, score


if __name__ == "__main__":
    main()
