"""Trainers that know nothing of contexts train a converted model through `use_context`."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import normswap
from tests.support.documents import blocks
from tests.support.models import ConvNet


def make_model():
    torch.manual_seed(3)
    return normswap.convert(ConvNet(), "cn", contexts=3, verify=False)


def make_data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 3, 6, 6, generator=generator)
    classes = torch.randint(5, (12,), generator=generator)
    contexts = torch.tensor([0, 1, 2] * 4)
    return TensorDataset(images, classes, contexts)


def loader():
    return DataLoader(make_data(), batch_size=6)


def trained_by_hand(model):
    """Return the state after two epochs of a loop that passes the context itself."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for _ in range(2):
        for images, classes, contexts in loader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images, context=contexts), classes).backward()
            optimizer.step()
    return model.state_dict()


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)


def test_a_loop_that_knows_of_no_contexts_trains_through_its_loader():
    model = make_model()
    expected = trained_by_hand(copy.deepcopy(model))

    def with_contexts():
        for images, classes, contexts in loader():
            with normswap.use_context(model, contexts):
                yield images, classes

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for _ in range(2):
        for images, classes in with_contexts():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), classes).backward()
            optimizer.step()
    assert_same_state(model.state_dict(), expected)


@pytest.mark.filterwarnings("ignore::Warning:lightning")
def test_a_lightning_module_trains_through_use_context(tmp_path):
    lightning = pytest.importorskip("lightning")
    # The class of the front page, which leaves out what is as usual.
    (code,) = (code for code in blocks("README.md", "python") if "LightningModule" in code)
    given = {"normswap": normswap, "cross_entropy": nn.functional.cross_entropy}
    exec(compile(code, "README.md", "exec"), given)

    class Task(given["Task"]):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model = make_model()
    expected = trained_by_hand(copy.deepcopy(model))
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    task = Task(model)
    trainer.fit(task, loader())
    assert_same_state(model.state_dict(), expected)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    again = Task(make_model())
    again.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    assert_same_state(again.model.state_dict(), expected)


def test_an_accelerate_loop_trains_through_use_context():
    accelerate = pytest.importorskip("accelerate")
    model = make_model()
    expected = trained_by_hand(copy.deepcopy(model))
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, optimizer, batches = accelerator.prepare(model, optimizer, loader())
    prepared.train()
    for _ in range(2):
        for images, classes, contexts in batches:
            with accelerator.accumulate(prepared), normswap.use_context(prepared, contexts):
                loss = nn.functional.cross_entropy(prepared(images), classes)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    assert_same_state(accelerator.unwrap_model(prepared).state_dict(), expected)
