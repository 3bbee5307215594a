"""Masks: the published counts, a stable order, one draw from the random stream."""

import pytest
import torch
from cases import BF16, F16, F32, F64
from conftest import DEVICE

from mae_kernels import masking_from_mask, random_masking, reference

pytestmark = pytest.mark.usefixtures("poisoned_empty", "backend")


def assert_same(ours, expected):
    for name, x, y in zip(ours._fields, ours, expected, strict=True):
        assert x.dtype == y.dtype, name
        assert torch.equal(x, y), name


def by_hand(noise, num_keep):
    """The four tensors from Python's own stable sort."""
    shuffle = [sorted(range(len(row)), key=row.__getitem__) for row in noise.tolist()]
    restore = [[row.index(patch) for patch in range(len(row))] for row in shuffle]
    keep, hide = zip(*((row[:num_keep], row[num_keep:]) for row in shuffle), strict=True)
    mask = [[patch in row for patch in range(noise.shape[1])] for row in hide]
    return torch.tensor(keep), torch.tensor(hide), torch.tensor(restore), torch.tensor(mask)


@pytest.mark.eager
@pytest.mark.parametrize(
    ("num_patches", "ratio", "visible", "visible_when_masked_are_counted"),
    [
        (196, 0.75, 49, 49),
        (196, 0.9, 19, 20),
        (100, 0.9, 9, 10),  # 100 * (1 - 0.9) is 9.999999999999998
        (197, 0.75, 49, 50),
        (1568, 0.9, 156, 157),
        (49, 0.6, 19, 20),
        (10, 0.5, 5, 5),
        (2, 0.5, 1, 1),
        (196, 0.994, 1, 2),
        (196, 0.006, 194, 195),
    ],
)
def test_counts_truncate_in_double(num_patches, ratio, visible, visible_when_masked_are_counted):
    assert random_masking(2, num_patches, ratio).ids_keep.shape == (2, visible)
    assert reference.random_masking(2, num_patches, ratio).ids_keep.shape == (2, visible)
    other = random_masking(2, num_patches, ratio, count="masked")
    assert other.ids_keep.shape == (2, visible_when_masked_are_counted)
    assert other.ids_mask.shape == (2, num_patches - visible_when_masked_are_counted)


def test_count_masked_moves_only_the_border():
    noise = torch.rand(3, 49)
    fewer, more = (random_masking(3, 49, 0.6, noise=noise, count=side) for side in ("visible", "masked"))
    assert_same(more, by_hand(noise, 20))
    assert torch.equal(more.ids_keep[:, :19], fewer.ids_keep)
    assert torch.equal(more.ids_restore, fewer.ids_restore)


@pytest.mark.parametrize(
    ("n", "num_patches", "dtype"),
    [
        *((n, num_patches, dtype) for n, num_patches in [(1, 49), (3, 2)] for dtype in (F32, F64, BF16, F16)),
        (3, 196, F16),
        (3, 197, F32),
        (1, 1568, BF16),
        (1, 1568, F64),
    ],
)
def test_given_noise(n, num_patches, dtype):
    noise = torch.rand(n, num_patches, dtype=dtype)  # half precision has ties
    before = noise.clone()
    masking = random_masking(n, num_patches, noise=noise, mask_ratio=0.5)
    assert_same(masking, reference.random_masking(n, num_patches, noise=noise, mask_ratio=0.5))
    assert_same(masking, by_hand(noise, num_patches // 2))
    assert torch.equal(noise, before)


@pytest.mark.parametrize("num_patches", [16, 17, 196])
def test_ties_go_to_the_lower_index(num_patches):
    noise = torch.stack([torch.randint(levels, (num_patches,)).float() for levels in (1, 2, 5)])
    masking = random_masking(3, num_patches, 0.6, noise=noise)
    assert_same(masking, by_hand(noise, int(num_patches * (1 - 0.6))))
    assert masking.ids_restore[0].tolist() == list(range(num_patches))


@pytest.mark.parametrize(
    "build",
    [
        lambda: torch.arange(40.0).remainder(7).view(10, 4).t(),
        lambda: torch.arange(40.0).remainder(7).view(4, 10)[:, ::2],
        lambda: torch.arange(10.0).remainder(3).expand(4, 10),
        lambda: torch.arange(44.0).remainder(7).view(4, 11)[:, 1:],
    ],
    ids=["transposed", "every second", "expanded", "slice"],
)
def test_noise_strides(build):
    noise = build()
    masking = random_masking(*noise.shape, 0.5, noise=noise)
    assert_same(masking, by_hand(noise, noise.shape[1] // 2))
    for name, x in masking._asdict().items():
        assert x.is_contiguous(), f"{name} has strides {x.stride()}"


def test_one_draw_from_the_random_stream():
    torch.manual_seed(7)
    ours = random_masking(3, 49)
    after = torch.rand(5)
    torch.manual_seed(7)
    assert_same(ours, reference.random_masking(3, 49))
    assert torch.equal(after, torch.rand(5))
    torch.manual_seed(7)
    noise = torch.rand(3, 49, dtype=torch.float32)
    state = torch.get_rng_state()
    assert_same(ours, random_masking(3, 49, noise=noise))
    assert torch.equal(state, torch.get_rng_state())


def test_the_draw_is_float32_under_any_default_dtype():
    torch.manual_seed(7)
    expected = random_masking(3, 49)
    torch.manual_seed(7)
    torch.set_default_dtype(F64)
    try:
        assert_same(random_masking(3, 49), expected)
    finally:
        torch.set_default_dtype(F32)


def test_own_generator():
    state = torch.get_rng_state()
    first, second = (torch.Generator(DEVICE).manual_seed(5) for _ in range(2))
    ours = random_masking(3, 49, generator=first, device=DEVICE)
    assert torch.equal(state, torch.get_rng_state())
    assert_same(ours, reference.random_masking(3, 49, generator=second))


def test_rows_are_masked_independently():
    masking = random_masking(3, 49)
    assert len({tuple(row) for row in masking.mask.tolist()}) == 3


def test_two_runs_are_equal():
    noise = torch.rand(3, 49).bfloat16()
    assert_same(random_masking(3, 49, noise=noise), random_masking(3, 49, noise=noise))


@pytest.mark.parametrize(
    ("n", "num_patches", "hidden"), [(1, 49, 48), (3, 196, 147), (3, 197, 1), (1, 2, 1), (1, 1568, 700)]
)
def test_masking_from_mask(n, num_patches, hidden):
    mask = torch.rand(n, num_patches).argsort(dim=1) < hidden
    before = mask.clone()
    masking = masking_from_mask(mask)
    assert torch.equal(masking.ids_keep, (~mask).nonzero()[:, 1].view(n, -1))  # ascending
    assert torch.equal(masking.ids_mask, mask.nonzero()[:, 1].view(n, -1))
    shuffle = torch.cat([masking.ids_keep, masking.ids_mask], dim=1)
    assert torch.equal(shuffle.gather(1, masking.ids_restore), torch.arange(num_patches).expand(n, -1))
    assert torch.equal(masking.mask, before)
    assert torch.equal(mask, before)


def test_masking_from_mask_takes_the_mask_of_random_masking():
    ours = random_masking(3, 49)
    again = masking_from_mask(ours.mask)
    assert torch.equal(again.mask, ours.mask)
    assert torch.equal(again.ids_keep, ours.ids_keep.sort(dim=1).values)


def test_masking_from_a_transposed_mask():
    mask = (torch.arange(12).view(6, 2) % 3 == 0).t()
    assert_same(masking_from_mask(mask), masking_from_mask(mask.contiguous()))


def test_the_mask_of_the_user_is_not_shared():
    mask = torch.arange(8).view(2, 4) % 2 == 0
    masking = masking_from_mask(mask)
    masking.mask.fill_(True)
    assert not mask.all()
