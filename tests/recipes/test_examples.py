"""Each example runs, learns from labels that arrive, and gives back what it trained."""

import importlib

import pytest
import torch
from torch.utils.data import DataLoader

from normswap.methods.layer import ContextLayer
from tests.support.sampling import sampled

# The package that an example is about, and what its score has to reach; chance is in brackets.
EXAMPLES = {
    "plain": ("sklearn", 0.8),  # (0.1)
    "lightning_module": ("lightning", 0.8),  # (0.1)
    "hf_trainer": ("transformers", 0.7),  # (0.1)
    "accelerate_loop": ("accelerate", 0.8),  # (0.1)
    "timm_style": ("timm", 0.7),  # (0.1)
    "torchvision_detection": ("torchvision", 0.6),  # (0.05)
    "monai_sites": ("monai", 0.6),  # Dice (0.01)
    "fastai_learner": ("fastai", 0.8),  # (0.1)
    "ultralytics_cameras": ("ultralytics", 0.5),  # mAP50 (0)
    "braindecode_subjects": ("braindecode", 0.9),  # (0.5)
    "pyg_graphs": ("torch_geometric", 0.75),  # (0.5)
}


def run(name, tmp_path, **settings):
    for package in ("sklearn", EXAMPLES[name][0]):
        pytest.importorskip(package)
    return importlib.import_module(f"recipes.examples.{name}").main(str(tmp_path), **settings)


# Of detection a run is shortened; the whole one is exhaustive.
LONG = "torchvision_detection"


@pytest.mark.filterwarnings("ignore")  # of the packages, which are not pinned
@pytest.mark.parametrize("name", sampled(sorted(EXAMPLES, key=LONG.__eq__), len(EXAMPLES) - 1))
def test_an_example_learns_and_every_context_gets_its_samples(name, tmp_path):
    model, score = run(name, tmp_path)
    assert score > EXAMPLES[name][1]
    check_contexts(model)


@pytest.mark.filterwarnings("ignore")
def test_the_example_of_detection_gives_every_context_its_samples(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")

    def first(rows, *given, **settings):
        return DataLoader(rows[:36], *given, **settings)

    monkeypatch.setattr(f"recipes.examples.{LONG}.DataLoader", first)
    check_contexts(run(LONG, tmp_path)[0])


def check_contexts(model):
    layers = [m for m in model.modules() if isinstance(m, ContextLayer)]
    assert layers
    for layer in layers:
        for table in (layer.weight, layer.running_mean):
            start = 1 if table is layer.weight else 0
            assert (table != start).any(1).all(), "a context never had a sample"
            assert not torch.equal(table[0], table[1])


@pytest.mark.filterwarnings("ignore")
def test_ultralytics_weights_are_taken_before_and_after_the_conversion(tmp_path):
    pytest.importorskip("ultralytics")
    from ultralytics.models.yolo.detect import DetectionTrainer

    from recipes.examples.ultralytics_cameras import Trainer, write_scenes

    write_scenes(tmp_path)
    given = {name: str(tmp_path / f"{name}.yaml") for name in ("model", "data")}
    trainer = Trainer(overrides={**given, "project": str(tmp_path), "device": "cpu"})
    base = DetectionTrainer.get_model(trainer, given["model"])
    for tensor in (*base.parameters(), *base.buffers()):
        tensor.data.add_(1)
    pretrained = trainer.get_model(given["model"], base).eval()
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(pretrained(x, context=["day", "thermal"])[0], base.eval()(x)[0])
    for tensor in pretrained.parameters():
        tensor.data.add_(torch.rand_like(tensor))
    resumed = trainer.get_model(given["model"], pretrained).state_dict()
    for name, tensor in pretrained.state_dict().items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_integers_pass_the_default_collator_of_transformers(tmp_path):
    pytest.importorskip("transformers")
    from recipes.examples.hf_trainer import Rows
    from recipes.examples.scanners import SCANNERS

    class Few(Rows):
        def __len__(self):
            return 240  # one batch to evaluate, four to train

    class Integers(Few):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            return {**row, "context": SCANNERS.index(row["context"])}

    model, named = run("hf_trainer", tmp_path / "names", rows=Few)
    twin, numbered = run("hf_trainer", tmp_path / "numbers", rows=Integers, collator=None)
    assert named == numbered
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in twin.state_dict().items())


def test_mixup_within_contexts_mixes_no_two():
    pytest.importorskip("timm")
    pytest.importorskip("sklearn")
    from timm.data import Mixup

    from recipes.examples.timm_style import mixed_within_contexts

    labels = torch.tensor([0, 1, 0, 1, 1, 0, 1, 1])
    images = (10.0**labels)[:, None, None, None].expand(8, 1, 2, 2).clone()
    classes = torch.arange(8)
    mixed, targets, left = mixed_within_contexts(
        Mixup(num_classes=8, label_smoothing=0), images, classes, labels
    )
    assert left.tolist() == [0, 0, 1, 1, 1, 1]  # of three zeros and five ones
    torch.testing.assert_close(mixed[:, 0, 0, 0], 10.0**left)
    assert (targets @ labels.float()).tolist() == pytest.approx(left.tolist())
