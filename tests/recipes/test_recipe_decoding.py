import numpy as np
import pytest
from PIL import Image

from recipes.common import decoding
from recipes.common.errors import RecipeError


@pytest.fixture
def few(monkeypatch):
    """Let a few files be enough for two processes."""
    monkeypatch.setattr(decoding, "LEAST", 5)


def test_processes_decode_in_order(few, folder):
    paths = sorted(folder.rglob("*.png"))
    images = decoding.decode(paths, 16, workers=2)
    assert images.shape == (20, 16, 16, 3)
    wanted = np.array([Image.open(path).getpixel((0, 0)) for path in paths])
    assert np.array_equal(images[:, 0, 0], wanted)


def test_an_image_that_cannot_be_read_is_told_by_its_process(few, folder):
    paths = sorted(folder.rglob("*.png"))
    paths[7].write_bytes(b"no image")
    with pytest.raises(RecipeError, match=r"cannot read the image .*\.png"):
        decoding.decode(paths, 16, workers=2)
