"""The digits task: split before augmentation, the same every time."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.models import digits


def test_no_original_is_on_both_sides() -> None:
    """No held-out digit has itself, pixel for pixel, among the training ones, nor is any lost."""
    train, held_out = (digits.originals(held_out=side) for side in (False, True))
    seen = {image.tobytes() for image in train.pixels}

    assert not any(image.tobytes() in seen for image in held_out.pixels)
    assert len(train.labels) + len(held_out.labels) == 1797


def test_the_held_out_set_is_the_same_every_time() -> None:
    """Two calls agree to the last bit, so payloads and accuracies can be compared across processes."""
    first, second = digits.held_out(), digits.held_out()

    assert first.pixels.shape == (digits.HELD_OUT_IMAGES, 1, digits.IMAGE_SIZE, digits.IMAGE_SIZE)
    assert first.pixels.dtype == np.float32
    assert first.labels.shape == (digits.HELD_OUT_IMAGES,)
    assert np.array_equal(first.pixels, second.pixels)
    assert np.array_equal(first.labels, second.labels)


def test_every_digit_is_held_out_about_as_often() -> None:
    """No accuracy can come from guessing one digit."""
    counts = np.bincount(digits.held_out().labels, minlength=10)

    assert counts.min() > 0.07 * digits.HELD_OUT_IMAGES
    assert counts.max() < 0.13 * digits.HELD_OUT_IMAGES


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_augmentation_keeps_the_ink_on_the_image(seed: int) -> None:
    """Whatever is drawn, pixels are finite and a full square leaves the border mostly noise."""
    ink = np.ones((4, 8, 8), dtype=np.float32)
    drawn = digits.augment(ink, np.random.default_rng(seed))

    assert drawn.shape == (4, 1, digits.IMAGE_SIZE, digits.IMAGE_SIZE)
    assert drawn.dtype == np.float32
    assert np.isfinite(drawn).all()
    centre = drawn[:, 0, 6:14, 6:14].mean(axis=(1, 2))
    assert (centre > 0.4).all()
