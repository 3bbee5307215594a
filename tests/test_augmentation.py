"""What is done to a batch of labelled images: pairs mixed, boxes erased, against loops and published rules."""

import math

import numpy as np
import pytest
import torch

from mae.training.augmentation import Mix, draw_erasing, draw_mix, mix_images, mixed_targets


@pytest.mark.parametrize("mix", [Mix(0.3), Mix(1 - 10 / 48, (slice(1, 6), slice(2, 4)))], ids=["mixup", "cutmix"])
def test_pairs_are_mixed_pixel_by_pixel(mix):
    x, numbers = torch.rand(6, 2, 8, 6, dtype=torch.float64), torch.tensor([0, 4, 2, 2, 3, 1])
    before, expected, targets = x.clone(), x.numpy().copy(), np.zeros((6, 5))
    for i in range(6):
        other = i + 1 if i % 2 == 0 else i - 1
        for row, column in np.ndindex(8, 6):
            if mix.box is None:
                expected[i, :, row, column] = 0.3 * x[i, :, row, column] + 0.7 * x[other, :, row, column]
            elif 1 <= row < 6 and 2 <= column < 4:
                expected[i, :, row, column] = x[other, :, row, column]
        for k in range(5):
            own, others = (0.9 * (numbers[j] == k) + 0.1 / 5 for j in (i, other))
            targets[i, k] = mix.share * own + (1 - mix.share) * others
    np.testing.assert_allclose(mix_images(x, mix), expected, rtol=1e-14)
    assert torch.equal(x, before)
    np.testing.assert_allclose(mixed_targets(numbers, 5, 0.1, mix), targets, rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 3.0])
def test_shares_of_mixup_are_of_a_beta_distribution(alpha):
    shares = [draw_mix(1, step, alpha, 0.0, (28, 28)) for step in range(2000)]
    assert all(mix.box is None for mix in shares)
    expected = np.random.default_rng(0).beta(alpha, alpha, 10**6)
    ours = np.array([mix.share for mix in shares])
    assert ours.mean() == pytest.approx(0.5, abs=0.03)
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):  # how many are below the quantile
        assert (ours < np.quantile(expected, share)).mean() == pytest.approx(share, abs=0.035)


def test_the_share_of_cutmix_is_the_area_that_is_not_pasted():
    own_and_other = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1).expand(2, 1, 20, 36)
    drawn = [draw_mix(0, step, 0.0, 1.0, (20, 36)) for step in range(2000)]
    for mix in drawn[:200]:
        assert mix_images(own_and_other, mix)[0].mean().item() == pytest.approx(mix.share, abs=1e-6)
    middles = np.array([[(part.start + part.stop) / 2 for part in mix.box] for mix in drawn])
    np.testing.assert_allclose(middles.mean(0), (10, 18), atol=1)
    # A box of the share 1 - u in its middle, of which what lies outside is cut off: a simulation by the published rule.
    random = np.random.default_rng(0)
    areas = []
    for u in random.random(20_000):
        sides = []
        for length in (20, 36):
            cut, middle = int(length * math.sqrt(1 - u)), random.integers(length)
            sides.append(min(length, middle + cut // 2) - max(0, middle - cut // 2))
        areas.append(math.prod(sides) / 720)
    ours = np.array([1 - mix.share for mix in drawn])
    np.testing.assert_allclose(np.quantile(ours, (0.2, 0.5, 0.8)), np.quantile(areas, (0.2, 0.5, 0.8)), atol=0.03)


def test_mixup_and_cutmix_have_half_of_the_steps_each():
    cuts = [draw_mix(0, step, 0.8, 1.0, (28, 28)).box is not None for step in range(2000)]
    assert np.mean(cuts) == pytest.approx(0.5, abs=0.04)
    for step, is_cut in enumerate(cuts[:50]):  # each by its own parameter
        alone = (0.0, 1.0) if is_cut else (0.8, 0.0)
        assert draw_mix(0, step, 0.8, 1.0, (28, 28)) == draw_mix(0, step, *alone, (28, 28))
    assert draw_mix(0, 0, 0.0, 0.0, (28, 28)) == Mix()


def test_boxes_of_one_colour_are_erased():
    erasing = draw_erasing(0, 0, 0.7, 8, 3, (24, 40))
    x = torch.randint(0, 256, (8, 3, 2, 24, 40), dtype=torch.uint8)  # clips: all frames alike
    expected = x.numpy().copy()
    for i, (top, left, rows, columns) in enumerate(erasing.boxes):
        for channel in range(3):
            colour = int(256 * erasing.colours[i, channel])
            expected[i, channel, :, top : top + rows, left : left + columns] = colour
    assert np.array_equal(erasing(x), expected)
    assert np.array_equal(erasing(x[:, :, 0]), expected[:, :, 0])
    assert 0 < (erasing.boxes[:, 2] == 0).sum() < 8


def test_boxes_have_2_to_33_percent_of_the_area_in_the_asked_share_of_images():
    drawn = [draw_erasing(5, step, 0.25, 64, 3, (100, 200)) for step in range(40)]
    boxes = np.concatenate([x.boxes for x in drawn])
    found = boxes[boxes[:, 2] > 0]
    assert len(found) / len(boxes) == pytest.approx(0.25, abs=0.03)
    top, left, rows, columns = found.T
    assert 0 <= top.min() <= (top + rows).max() <= 100
    assert 0 <= left.min() <= (left + columns).max() <= 200
    for places in (top / (100 - rows), left / (200 - columns)):  # from edge to edge alike
        np.testing.assert_allclose(np.quantile(places, (0.25, 0.5, 0.75)), (0.25, 0.5, 0.75), atol=0.06)
    areas, ratios = rows * columns / 20_000, rows / columns
    assert 0.018 < areas.min() < 0.03  # sides are rounded to pixels
    assert 0.31 < areas.max() < 0.337
    assert areas.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    assert 0.29 < ratios.min() < 0.33
    assert 2 < ratios.max() < 3.4
    assert np.array_equal(drawn[7].boxes, draw_erasing(5, 7, 0.25, 64, 3, (100, 200)).boxes)
    assert not np.array_equal(drawn[7].boxes, drawn[8].boxes)
