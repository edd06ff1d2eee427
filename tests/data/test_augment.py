"""Augmentation: each change does what it says, within its range, and follows from the generator alone."""

import math

import numpy as np
import pytest
from PIL import Image

from jaxtransfer.data import DataError
from jaxtransfer.data.augment import Augment, erase, random_crop, vary
from tests.data import pictures

BILINEAR = Image.Resampling.BILINEAR
BAD = {
    r"crop_scale: must be \(a, b\) with 0 < a <= b <= 1": {"crop_scale": (0.5, 1.5)},
    r"crop_scale: must be .* got \(0.0, 1.0\)": {"crop_scale": (0.0, 1.0)},
    "crop_ratio: must be": {"crop_scale": (0.5, 1.0), "crop_ratio": (2.0, 1.0)},
    "crop_ratio: is only read with crop_scale": {"crop_ratio": (1.0, 1.0)},
    "pad: must be at least 0": {"pad": -1},
    "rotate: must be in": {"rotate": 181.0},
    r"brightness: must be in \[0, 1\], got 1.5": {"brightness": 1.5},
    "contrast: must be in": {"contrast": -0.1},
    "erase: must be in": {"erase": math.nan},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options(message):
    with pytest.raises(DataError, match=message):
        Augment(**BAD[message])


def rng(seed):
    return np.random.default_rng(seed)


def varied(array, augment, count=64):
    """What becomes of an image, many times."""
    image = Image.fromarray(array)
    return [np.asarray(vary(image, augment, rng(seed))).astype(np.float64) for seed in range(count)]


def test_nothing_by_default():
    array = pictures.noise()
    assert all(np.array_equal(out, array) for out in varied(array, Augment(), 3))


def test_flip_is_the_image_or_its_mirror():
    array = pictures.noise()
    mirrored = [not np.array_equal(out, array) for out in varied(array, Augment(flip=True))]
    assert 20 < sum(mirrored) < 44
    for out, turned in zip(varied(array, Augment(flip=True)), mirrored, strict=True):
        assert np.array_equal(out, array[:, ::-1] if turned else array)


def test_pad_shifts_by_so_many_pixels_over_black():
    array = np.zeros((9, 9), np.uint8)
    array[4, 4] = 200
    places = {tuple(np.argwhere(out == 200)[0] - 4) for out in varied(array, Augment(pad=2), 300)}
    assert places == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}
    white = np.full((9, 9), 255, np.uint8)
    shifted = varied(white, Augment(pad=2))
    assert {int((out == 0).sum()) for out in shifted} <= {81 - (9 - i) * (9 - j) for i in range(3) for j in range(3)}
    assert all(set(np.unique(out)) <= {0, 255} for out in shifted)


def test_brightness_is_a_factor():
    grey = np.full((4, 4, 3), 100, np.uint8)
    levels = [out[0, 0, 0] for out in varied(grey, Augment(brightness=0.3), 300)]
    assert 70 <= min(levels) < 75
    assert 125 < max(levels) <= 130


def test_contrast_keeps_the_mean():
    array = np.repeat(np.array([[80, 120]], np.uint8), 4, 0)
    spread = [out[0, 1] - out[0, 0] for out in varied(array, Augment(contrast=0.5), 300)]
    assert 20 <= min(spread) < 24
    assert 56 < max(spread) <= 60
    assert all(abs(out.mean() - 100) <= 1 for out in varied(array, Augment(contrast=0.5)))


def test_rotation_is_within_its_degrees():
    """A point straight above the centre moves along its circle."""
    array = np.zeros((101, 101), np.uint8)
    array[8:13, 48:53] = 255
    angles = []
    for out in varied(array, Augment(rotate=30.0), 200):
        y, x = np.average(np.indices(out.shape).reshape(2, -1), axis=1, weights=out.ravel()) - 50
        angles.append(math.degrees(math.atan2(x, -y)))
        assert math.hypot(x, y) == pytest.approx(40, abs=1)
    assert -30.5 < min(angles) < -25
    assert 25 < max(angles) < 30.5


def test_random_crop_of_all_is_a_resize():
    image = Image.fromarray(pictures.noise(20, 20))
    augment = Augment(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    want = np.asarray(image.resize((7, 5), BILINEAR))
    assert np.array_equal(np.asarray(random_crop(image, augment, (5, 7), BILINEAR, rng(0))), want)


def test_random_crop_covers_its_areas_and_shapes(monkeypatch):
    image, boxes = Image.fromarray(pictures.noise(200, 300)), []
    crop = Image.Image.crop
    monkeypatch.setattr(Image.Image, "crop", lambda self, box: boxes.append(box) or crop(self, box))
    for seed in range(300):
        assert random_crop(image, Augment(crop_scale=(0.1, 0.5)), (4, 4), BILINEAR, rng(seed)).size == (4, 4)
    left, top, right, bottom = np.array(boxes).T
    assert min(left) >= 0 and min(top) >= 0 and max(right) <= 300 and max(bottom) <= 200
    areas, ratios = (right - left) * (bottom - top) / 60_000, (right - left) / (bottom - top)
    assert 0.098 < min(areas) < 0.13 and 0.45 < max(areas) < 0.503
    assert 0.74 < min(ratios) < 0.78 and 1.28 < max(ratios) < 1.35
    assert len(set(left)) > 100


@pytest.mark.parametrize("size", [(2, 200), (200, 2)])
def test_random_crop_of_what_is_long(size, monkeypatch):
    """No crop of such a shape fits: the largest in the middle that does."""
    image = Image.new("L", size)
    for seed in range(20):
        assert random_crop(image, Augment(crop_scale=(0.9, 1.0)), (4, 4), BILINEAR, rng(seed)).size == (4, 4)


def test_erase_sets_a_rectangle_to_zero():
    count = 0
    for seed in range(200):
        pixels = erase(np.ones((40, 30, 3), np.float32), Augment(erase=0.5), rng(seed))
        gone = np.argwhere((pixels == 0).all(-1))
        if len(gone):
            count += 1
            sides = gone.max(0) - gone.min(0) + 1
            assert sides.prod() == len(gone)
            assert 0.015 < len(gone) / 1200 < 0.36
            assert pixels.sum() == 3 * (1200 - len(gone))
    assert 75 < count < 125
    assert erase(np.ones((4, 4, 1), np.float32), Augment(), rng(0)).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_all_together_follow_from_the_generator(channels):
    augment = Augment(crop_scale=(0.2, 1.0), pad=2, flip=True, rotate=20.0, brightness=0.4, contrast=0.4, erase=1.0)
    image = Image.fromarray(pictures.noise(30, 30, channels))

    def make(seed):
        generator = rng(seed)
        out = vary(random_crop(image, augment, (16, 16), BILINEAR, generator), augment, generator)
        return erase(np.asarray(out).reshape(16, 16, channels).astype(np.float32), augment, generator)

    assert np.array_equal(make(1), make(1))
    assert not np.array_equal(make(1), make(2))
