import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from skimage import color, data, filters

from recipes.common import corrupt
from recipes.common.corrupt import FAMILIES, SEVERITIES

SIZE = 64


@pytest.fixture(scope="module")
def photographs():
    """Parts of a photograph, (8, 3, 64, 64) uint8."""
    whole = Image.fromarray(data.astronaut())
    parts = [whole.crop((x, y, x + 256, y + 256)) for x in (0, 60, 128, 256) for y in (0, 200)]
    pixels = np.stack([np.asarray(part.resize((SIZE, SIZE))) for part in parts])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def grey(level, n=40):
    return torch.full((n, 3, SIZE, SIZE), level, dtype=torch.uint8)


def floats(images):
    return images.double().numpy() / 255


def about_each_pixel(image, points, weights):
    """Average a channel, bilinear between pixels, over (y, x) about each pixel: one at a time."""
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]].astype(float)
    total = np.zeros_like(image)
    for (y, x), weight in zip(points, weights, strict=True):
        total += weight * ndimage.map_coordinates(
            image, [rows + y, columns + x], order=1, mode="nearest"
        )
    return total / sum(weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_corruption_is_the_same_again_and_leaves_its_input_alone(photographs, family):
    before = photographs.clone()
    once, again = (corrupt.corrupt(photographs, family, 3, seed=1) for _ in range(2))

    assert torch.equal(once, again)
    assert torch.equal(photographs, before)
    assert once.shape == photographs.shape
    assert once.dtype == torch.uint8
    assert not torch.equal(once, photographs)


# Later severities of these differ in kind: finer clouds or waves, more blur, fewer flakes.
KINDS = ("glass_blur", "snow", "fog", "elastic_transform")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in KINDS])
def test_severity_moves_images_further_from_what_they_were(photographs, family):
    moved = [
        np.abs(floats(corrupt.corrupt(photographs, family, s, seed=0)) - floats(photographs)).mean()
        for s in SEVERITIES
    ]
    assert moved == sorted(moved)
    assert moved[0] > 0.005


def test_gaussian_noise_has_the_published_spread():
    noise = floats(corrupt.corrupt(grey(128), "gaussian_noise", 1, seed=0)) - 128 / 255
    assert abs(noise.mean()) < 1e-3
    assert noise.std() == pytest.approx(0.08, rel=0.02)


def test_shot_noise_varies_as_the_light():
    for level in (51, 128):
        found = floats(corrupt.corrupt(grey(level), "shot_noise", 1, seed=0))
        assert found.var() == pytest.approx(level / 255 / 60, rel=0.05)


def test_impulse_noise_makes_as_many_white_as_black():
    found = corrupt.corrupt(grey(128), "impulse_noise", 5, seed=0)
    for value in (0, 255):
        assert (found == value).double().mean().item() == pytest.approx(0.27 / 2, rel=0.03)


def test_defocus_averages_a_disk(photographs):
    radius = 8 * SIZE / 224
    grid = np.linspace(-radius, radius, 41)
    points = [(y, x) for y in grid for x in grid if y**2 + x**2 <= radius**2 * (1 + 1e-6)]
    expected = about_each_pixel(floats(photographs)[0, 0], points, [1.0] * len(points))
    found = floats(corrupt.corrupt(photographs, "defocus_blur", 4, seed=0))[0, 0]
    np.testing.assert_allclose(found, expected, atol=0.5 / 255 + 1e-5)


def test_glass_blur_exchanges_neighbours_in_turn_between_two_blurs(photographs):
    sigma, reach, rounds = 0.4 * SIZE / 32, 2, 2
    found = corrupt.glass_blur(
        photographs[:2].float() / 255, (0.4, 1, rounds), torch.Generator().manual_seed(3)
    )
    drawn, side = torch.Generator().manual_seed(3), SIZE - 2 * reach
    down, right = (
        torch.randint(-reach, reach, (rounds, side, side, 2), generator=drawn) for _ in range(2)
    )
    for number, picture in enumerate(floats(photographs)[:2]):
        channels = [ndimage.gaussian_filter(c, sigma, mode="mirror", radius=3) for c in picture]
        pixels = np.stack(channels, -1)
        for turn in range(rounds):
            for i, y in enumerate(range(SIZE - reach, reach, -1)):
                for j, x in enumerate(range(SIZE - reach, reach, -1)):
                    other = y + down[turn, i, j, number], x + right[turn, i, j, number]
                    pixels[y, x], pixels[other] = pixels[other].copy(), pixels[y, x].copy()
        expected = [
            ndimage.gaussian_filter(pixels[..., c], sigma, mode="mirror", radius=3)
            for c in range(3)
        ]
        np.testing.assert_allclose(found[number].numpy(), expected, atol=1e-5)


def test_motion_blur_is_a_fading_trail(photographs):
    x = photographs[:1].float() / 255
    radius, sigma = 15 * SIZE / 224, 8 * SIZE / 224
    found = corrupt.motion_blur(x, (15, 8), torch.Generator().manual_seed(3))
    drawn = torch.rand(1, generator=torch.Generator().manual_seed(3)).item()
    angle = (2 * drawn - 1) * np.pi / 4
    along = np.linspace(0, 2 * radius, 33)
    points = [(t * np.sin(angle), t * np.cos(angle)) for t in along]
    expected = about_each_pixel(
        x[0, 0].double().numpy(), points, np.exp(-(along**2) / 2 / sigma**2)
    )
    np.testing.assert_allclose(found[0, 0].numpy(), expected, atol=1e-5)


def test_zoom_blur_averages_the_image_and_its_enlargements(photographs):
    image = floats(photographs)[0, 0]
    centre = (SIZE - 1) / 2
    rows, columns = np.mgrid[:SIZE, :SIZE] - centre
    enlarged = [
        ndimage.map_coordinates(image, [rows / z + centre, columns / z + centre], order=1)
        for z in (1, 1.02, 1.04, 1.06, 1.08, 1.10, 1.12, 1.14, 1.16, 1.18, 1.20)
    ]
    expected = (image + sum(enlarged)) / 12
    found = floats(corrupt.corrupt(photographs, "zoom_blur", 3, seed=0))[0, 0]
    np.testing.assert_allclose(found, expected, atol=0.5 / 255 + 1e-5)


def test_snow_falls_in_streaks_on_a_whiter_image_both_ways_round(photographs):
    size, (mean, deviation, zoom, least, radius, sigma, kept) = 56, corrupt.TABLE["snow"][1][2]
    picture = photographs[:1, :, :size, :size].float() / 255
    found = corrupt.snow(picture, corrupt.TABLE["snow"][1][2], torch.Generator().manual_seed(3))

    drawn, cells = torch.Generator().manual_seed(3), 224 // zoom
    noise = torch.randn(1, 1, cells, cells, generator=drawn)[0, 0].double().numpy()
    flakes = ndimage.zoom(mean + deviation * noise, zoom, order=1)
    flakes = np.where(flakes < least, 0, flakes.clip(0, 1))
    flakes = flakes.reshape(size, 4, size, 4).mean((1, 3))
    angle = (2 * torch.rand(1, generator=drawn).item() - 1) * np.pi / 4
    along = np.linspace(0, 2 * radius * size / 224, 33)
    points = [(t * np.cos(angle), t * np.sin(angle)) for t in along]
    weights = np.exp(-(along**2) / 2 / (sigma * size / 224) ** 2)
    fallen = about_each_pixel(flakes, points, weights)

    x = picture[0].double().numpy()
    grey = 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]
    whiter = kept * x + (1 - kept) * np.maximum(x, 1.5 * grey + 0.5)
    np.testing.assert_allclose(found[0].numpy(), whiter + fallen + np.rot90(fallen, 2), atol=1e-5)


def test_fog_is_light_added_and_keeps_the_brightest_value():
    x = torch.zeros(4, 3, SIZE, SIZE)
    x[:, :, :, SIZE // 2 :] = 0.8
    found = corrupt.fog(x, (1.5, 2), torch.Generator().manual_seed(0))
    clouds = found * (0.8 + 1.5) / 0.8 - x
    assert clouds.min() > -1e-5
    assert clouds.amax((1, 2, 3)).tolist() == pytest.approx([1.5] * 4, rel=1e-4)
    assert torch.allclose(clouds[:, 0], clouds[:, 2], atol=1e-5)
    assert found.max() <= 0.8 + 1e-5


def test_brightness_adds_to_the_value_of_hsv(photographs):
    hsv = color.rgb2hsv(floats(photographs).transpose(0, 2, 3, 1))
    hsv[..., 2] = (hsv[..., 2] + 0.3).clip(0, 1)
    expected = color.hsv2rgb(hsv).transpose(0, 3, 1, 2)
    found = floats(corrupt.corrupt(photographs, "brightness", 3, seed=0))
    np.testing.assert_allclose(found, expected, atol=0.5 / 255 + 1e-5)


def test_contrast_shrinks_towards_each_channels_mean(photographs):
    image = floats(photographs)
    mean = image.mean((2, 3), keepdims=True)
    found = floats(corrupt.corrupt(photographs, "contrast", 2, seed=0))
    np.testing.assert_allclose(found, mean + 0.3 * (image - mean), atol=0.5 / 255 + 1e-5)


def test_elastic_moves_pixels_as_far_as_cifar_c_does():
    """On a ramp the value says where a pixel came from."""
    size = 32
    ramp = (torch.arange(size) / size).expand(200, 3, size, size)
    found = corrupt.elastic_transform(ramp, (0.1, 0.03, 0.0), torch.Generator().manual_seed(0))
    moved = ((found - ramp) * size)[:, 0, :, 4:-4].double().numpy()

    draw = np.random.default_rng(0)
    fields = [
        filters.gaussian(draw.uniform(-1, 1, (size, size)), size * 0.03, mode="reflect", truncate=3)
        for _ in range(200)
    ]
    assert moved.std() == pytest.approx(np.std(fields) * size * 0.1, rel=0.05)


def test_elastic_moves_the_three_points_it_draws():
    size = 33  # so that the points are at pixels: 5, 16 and 27 are -2/3, 0 and 2/3 of the half side
    columns = ((torch.arange(size) + 0.5) / size * 2 - 1).expand(50, 3, size, size)
    found = corrupt.elastic_transform(columns, (0, 0, 0.02), torch.Generator().manual_seed(0))
    moved = (found - columns)[:, 0, [27, 5, 5], [27, 27, 5]]
    assert moved.abs().max() <= 0.04 + 1e-5
    assert moved.std().item() == pytest.approx(0.04 / 3**0.5, rel=0.1)


def test_pixelate_shrinks_and_enlarges_as_pil_does(photographs):
    image = Image.fromarray(photographs[0].permute(1, 2, 0).numpy())
    small = image.resize((25, 25), Image.Resampling.BOX)
    expected = np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BOX))
    found = corrupt.corrupt(photographs, "pixelate", 3, seed=0)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_size_down_to_sixteen_works(family):
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert corrupt.corrupt(images, family, 5, seed=0).shape == images.shape
