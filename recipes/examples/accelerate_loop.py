"""Accelerate: the prepared model takes `context=` as the model does, on one process or several.

pip install accelerate
python -m recipes.examples.accelerate_loop
accelerate launch --cpu --num_processes 2 -m recipes.examples.accelerate_loop
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import normswap
from recipes.examples.scanners import SCANNERS, Digits, accuracy, network


def main(folder="runs/examples/accelerate"):
    """Train, save and load; return the loaded model and its accuracy."""
    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    original = network()
    model = normswap.convert(original, "cn", contexts=SCANNERS)
    if accelerator.num_processes > 1:  # before prepare, which wraps: statistics of all processes
        model = normswap.convert_sync_batchnorm(model)
    optimizer = torch.optim.AdamW(normswap.param_groups(model, lr=0.005, weight_decay=0.05))
    size = 60 // accelerator.num_processes
    loader = DataLoader(Digits(train=True), batch_size=size, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    model.train()
    for epoch in range(6):
        for images, classes, scanners in loader:  # scanners: names, as the dataset gives them
            with accelerator.accumulate(model):
                loss = cross_entropy(model(images, context=scanners), classes)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}")

    trained = accelerator.unwrap_model(model)
    if accelerator.is_main_process:
        normswap.save(trained, Path(folder) / "norms")
    accelerator.wait_for_everyone()
    loaded = normswap.load(original, Path(folder) / "norms")
    score = accuracy(loaded)
    accelerator.print(f"accuracy {score:.3f}, after loading {folder}/norms")
    accelerator.end_training()
    return loaded, score


if __name__ == "__main__":
    main()
