"""A digits task that is hard enough for subnets to differ, made from scikit-learn's images.

The 1,797 originals, 8 x 8, are split into training and held-out ones first;
augmentation comes after, so no held-out image has a variant in training.
Every function is deterministic in its seed. No torch: load generators use this too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from superserve.errors import ConfigError

if TYPE_CHECKING:
    import numpy.typing as npt

IMAGE_SIZE = 20
"""Pixels in height and width of one augmented image; images are (1, 20, 20) float32."""

HELD_OUT_IMAGES = 4096
"""Augmented images in the held-out set."""

_SPLIT_SEED = 20250428  # fixed: with another split the weights would have seen held-out images
_HELD_OUT_SEED = 71
_HELD_OUT_ORIGINALS = 449  # a quarter of 1,797

# Chosen so that the smallest subnet errs on every sixth image and the largest on every twenty-sixth.
_PIXELS_PER_CELL = (1.4, 2.3)  # an original of 8 cells covers 11.2 to 18.4 of 20 pixels
_MAX_SHIFT = 2.5  # pixels
_MAX_TURN = 0.35  # radians, 20 degrees
_CONTRAST = (0.7, 1.0)
_OCCLUDED = 3  # pixels in height and width
_NOISE = 0.2  # standard deviation; ink is 1


class Images(NamedTuple):
    """Images and what they show.

    Attributes:
        pixels: Float32, (N, C, H, W), or (N, 8, 8) for originals.
        labels: The digits, int64, (N,).
    """

    pixels: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]


def originals(*, held_out: bool) -> Images:
    """Return one side of the split of scikit-learn's digits, as (N, 8, 8) from 0 to 1.

    Raises:
        ConfigError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415  an optional extra
    except ModuleNotFoundError as error:
        raise ConfigError("digits: expected scikit-learn; install superserve[demo]") from error
    digits: Any = load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(digits.target))
    chosen = order[:_HELD_OUT_ORIGINALS] if held_out else order[_HELD_OUT_ORIGINALS:]
    pixels = np.asarray(digits.images[chosen] / 16, dtype=np.float32)  # stored as 0 to 16
    return Images(pixels, np.asarray(digits.target[chosen], dtype=np.int64))


def held_out() -> Images:
    """Return the held-out set: 4,096 augmented images (N, 1, 20, 20) and their labels (N,)."""
    images = originals(held_out=True)
    chosen = np.arange(HELD_OUT_IMAGES) % len(images.labels)
    rng = np.random.default_rng(_HELD_OUT_SEED)
    return Images(augment(images.pixels[chosen], rng), images.labels[chosen])


def held_out_halves() -> tuple[Images, Images]:
    """Return the held-out set as two, with no original in both: about 2,048 images each."""
    images = held_out()
    is_first = np.arange(HELD_OUT_IMAGES) % _HELD_OUT_ORIGINALS < _HELD_OUT_ORIGINALS // 2
    first, second = (Images(images.pixels[chosen], images.labels[chosen]) for chosen in (is_first, ~is_first))
    return first, second


def training(n: int, *, seed: int) -> npt.NDArray[np.float32]:
    """Return `n` freshly augmented images of the training side, (n, 1, 20, 20)."""
    rng = np.random.default_rng((_SPLIT_SEED, seed))
    pixels = originals(held_out=False).pixels
    return augment(pixels[rng.integers(len(pixels), size=n)], rng)


def augment(pixels: npt.NDArray[np.float32], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Return each original (N, 8, 8) turned, scaled, shifted, dimmed, occluded and noisy, (N, 1, 20, 20)."""
    n = len(pixels)
    drawn = _sample(pixels, *_places(n, rng))  # (N, H, W)
    drawn *= rng.uniform(*_CONTRAST, size=(n, 1, 1)).astype(np.float32)
    drawn[_occlusions(n, rng)] = 0.5
    drawn += _NOISE * rng.standard_normal(drawn.shape, dtype=np.float32)
    return drawn[:, np.newaxis]  # (N, 1, H, W)


def _places(n: int, rng: np.random.Generator) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return, for each pixel of each image, the row and column of the original it shows, (N, H, W)."""
    turn, scale, down, right = (
        rng.uniform(low, high, size=(n, 1, 1)).astype(np.float32)
        for low, high in (
            (-_MAX_TURN, _MAX_TURN),
            _PIXELS_PER_CELL,
            (-_MAX_SHIFT, _MAX_SHIFT),
            (-_MAX_SHIFT, _MAX_SHIFT),
        )
    )
    centred = np.arange(IMAGE_SIZE, dtype=np.float32) - (IMAGE_SIZE - 1) / 2
    y = (centred[:, np.newaxis] - down) / scale
    x = (centred[np.newaxis, :] - right) / scale
    middle = np.float32(3.5)  # of cells 0 to 7
    rows = np.cos(turn) * y - np.sin(turn) * x + middle
    columns = np.sin(turn) * y + np.cos(turn) * x + middle
    return rows, columns


def _sample(
    pixels: npt.NDArray[np.float32], rows: npt.NDArray[np.float32], columns: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Interpolate linearly between the four cells around each place; nothing is drawn outside."""
    # Two empty cells around each original, so that places clipped to them read as empty.
    bordered = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))
    rows = np.clip(rows + 2, 0, bordered.shape[1] - 1.001)
    columns = np.clip(columns + 2, 0, bordered.shape[2] - 1.001)
    top, left = rows.astype(np.intp), columns.astype(np.intp)
    down, right = rows - top, columns - left
    image = np.arange(len(pixels))[:, np.newaxis, np.newaxis]
    upper = bordered[image, top, left] * (1 - right) + bordered[image, top, left + 1] * right
    lower = bordered[image, top + 1, left] * (1 - right) + bordered[image, top + 1, left + 1] * right
    return np.asarray(upper * (1 - down) + lower * down, dtype=np.float32)


def _occlusions(n: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Return a mask with one square anywhere in each image, (N, H, W)."""
    corner = rng.integers(0, IMAGE_SIZE - _OCCLUDED + 1, size=(2, n, 1))
    steps = np.arange(IMAGE_SIZE)
    inside = (steps >= corner) & (steps < corner + _OCCLUDED)  # (2, N, H)
    mask: npt.NDArray[np.bool_] = inside[0][:, :, np.newaxis] & inside[1][:, np.newaxis, :]
    return mask
