"""Masks: the published counts, a stable order, one draw from the random stream; the patterns of each strategy."""

import itertools
import math

import pytest
import torch
from cases import BF16, F16, F32, F64
from conftest import DEVICE

import mae_kernels
from mae.training.profile import LaunchCounter
from mae_kernels import (
    axis_masking,
    block_masking,
    grid_masking,
    masking_from_mask,
    random_masking,
    reference,
    tube_masking,
)

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
    ("n", "num_patches", "hidden"), [(1, 49, 48), (3, 196, 147), (3, 197, 1), (1, 2, 1), (1, 300, 140)]
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


def by_hand_padded(mask, num_keep):
    """The four tensors of a mask whose rows have different counts, row by row."""
    n, num_patches = mask.shape
    ids_keep, ids_mask = torch.full((n, num_keep), -1), torch.full((n, num_patches - 1), -1)
    ids_restore = torch.empty(n, num_patches, dtype=torch.int64)
    for row, hidden in enumerate(mask.tolist()):
        for ids, first, chosen in ((ids_keep, 0, False), (ids_mask, num_keep, True)):
            for place, patch in enumerate(i for i in range(num_patches) if hidden[i] == chosen):
                ids[row, place], ids_restore[row, patch] = patch, first + place
    return ids_keep, ids_mask, ids_restore, mask


@pytest.mark.parametrize(
    ("counts", "num_patches", "num_keep"),
    [((3, 7, 20), 49, 20), ((1, 4), 5, 5), ((1, 1), 2, 1), ((1, 1000, 4999), 5000, 4999)],
    ids=str,
)
def test_unequal_counts(counts, num_patches, num_keep):
    visible = torch.rand(num_patches, len(counts)).argsort(dim=0).t() < torch.tensor(counts)[:, None]
    masking = masking_from_mask(~visible, num_keep)
    assert_same(masking, by_hand_padded(~visible, num_keep))
    assert all(x.is_contiguous() for x in masking)
    assert masking.mask.data_ptr() != visible.data_ptr()


def test_unequal_counts_of_no_rows():
    masking = masking_from_mask(torch.ones(0, 6, dtype=torch.bool), num_keep=2)
    assert [x.shape for x in masking] == [(0, 2), (0, 5), (0, 6), (0, 6)]


def test_counts_that_nobody_checked_stay_inside_the_outputs(backend):
    """As on a GPU, where the counts are not read: too many visible patches are cut, and of none there is the first."""
    mask = torch.tensor([[0, 1, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]]).bool()
    implementation = mae_kernels.masking._masking_eager
    if backend == "triton":
        from mae_kernels.kernels import masking as implementation
    ours = mae_kernels.Masking(*implementation(mask, 6 - mask.sum(dim=1), 2, 5))
    keep, hide = [[0, 2], [0, -1]], [[3, 4, 1, 5, -1], [1, 2, 3, 4, 5]]
    restore = [[0, 4, 1, 2, 3, 5], [0, 2, 3, 4, 5, 6]]
    assert_same(ours, (torch.tensor(keep), torch.tensor(hide), torch.tensor(restore), torch.tensor(restore) >= 2))


def by_hand_in_frames(hidden):
    """The four tensors of masks ``[N, T', H', W']``, in ascending order."""
    mask = hidden.flatten(1)
    ids_shuffle = mask.int().argsort(dim=1, stable=True)
    num_keep = int((~mask[0]).sum())
    return ids_shuffle[:, :num_keep], ids_shuffle[:, num_keep:], ids_shuffle.argsort(dim=1), mask


def p_value(hidden):
    """How likely counts of hidden places [N, S] as uneven as these are, when the places are equally likely."""
    n, places = hidden.shape
    share = hidden.double().mean()
    chi2 = (hidden.sum(0) - n * share).square().sum() / (n * share * (1 - share)) * (places - 1) / places
    return torch.special.gammaincc(torch.tensor((places - 1) / 2, dtype=F64), chi2 / 2).item()


STRATEGIES = (tube_masking, block_masking, grid_masking, axis_masking)
ROWS = 10_000


@pytest.mark.eager
@pytest.mark.parametrize(
    ("strategy", "grid", "ratio", "hidden"),
    [
        (tube_masking, (2, 7, 4), 0.9, 2 * 25),
        (block_masking, (14, 14), 0.4, 78),
        (block_masking, (2, 3, 8), 0.9, 2 * 21),
        (grid_masking, (14, 14), 0.75, 147),
        (grid_masking, (2, 7, 5), 0.5, 2 * 17),
        (axis_masking, (8, 12), 0.75, 72),
        (axis_masking, (3, 5, 4), 0.9, 54),
    ],
)
def test_every_row_hides_the_same_number(strategy, grid, ratio, hidden):
    masking = strategy(ROWS, grid, ratio)
    num_patches = math.prod(grid)
    assert (masking.mask.sum(dim=1) == hidden).all()
    assert masking.ids_mask.shape == (ROWS, hidden)
    shuffle = torch.cat([masking.ids_keep, masking.ids_mask], dim=1)
    assert torch.equal(shuffle.gather(1, masking.ids_restore), torch.arange(num_patches).expand(ROWS, -1))
    assert torch.equal(masking.mask, masking.ids_restore >= num_patches - hidden)


@pytest.mark.eager
def test_what_is_equally_likely():
    assert p_value(tube_masking(ROWS, (2, 6, 8), 0.75).mask.view(ROWS, 2, 48)[:, 0]) > 1e-4
    assert p_value(axis_masking(ROWS, (6, 8), share=0).mask) > 1e-4
    for ratio in (0.25, 0.5, 0.75):
        places = grid_masking(ROWS, (4, 4), ratio).mask.view(ROWS, 4, 4)[:, :2, :2]
        assert p_value(places.flatten(1)) > 1e-4
    lines = axis_masking(ROWS, (8, 12), 42 / 96, share=0.25).mask.view(ROWS, 8, 12)
    assert p_value(lines.all(dim=2)) > 1e-4
    assert p_value(lines.all(dim=1)) > 1e-4
    # The two axes are independent.
    rows, columns = (lines.all(dim=d)[:, 0].double() for d in (2, 1))
    assert torch.corrcoef(torch.stack([rows, columns]))[0, 1].abs() < 4 / ROWS**0.5


def test_tubes(monkeypatch):
    torch.manual_seed(3)
    masking = tube_masking(4, (3, 4, 5), 0.75)
    torch.manual_seed(3)
    place = torch.rand(4, 20).argsort(dim=1).argsort(dim=1) >= 5
    assert_same(masking, by_hand_in_frames(place.view(4, 1, 4, 5).expand(-1, 3, -1, -1)))
    monkeypatch.setattr("mae_kernels.masking._draw", lambda shape, *_: torch.zeros(shape))
    hidden = tube_masking(4, (3, 4, 5), 0.75).mask.view(4, 3, 20)
    assert (hidden == hidden[:, :1]).all()  # among equal draws too


def block_by_hand(draws, height, width, hidden):
    """One mask from draws [4, R], rectangle by rectangle."""
    mask, least = torch.zeros(height, width, dtype=torch.bool), min(16, hidden)
    for area, aspect, top, left in [*zip(*draws.tolist(), strict=True), None]:
        area, ratio = least + (hidden - least) * area, 0.3 * (1 / 0.3**2) ** aspect
        h = min(max(round((area * ratio) ** 0.5), 1), height)
        w = min(max(round((area / ratio) ** 0.5), 1), width)
        first_row, first_column = int(top * (height - h + 1)), int(left * (width - w + 1))
        inside = itertools.product(range(first_row, first_row + h), range(first_column, first_column + w))
        inside = [place for place in inside if not mask[place]]
        left_to_hide = hidden - int(mask.sum())
        for place in inside[max(len(inside) - left_to_hide, 0) :]:
            mask[place] = True
        if len(inside) >= left_to_hide:
            return mask
    raise AssertionError("the rectangles hide too few")


@pytest.mark.parametrize(("grid", "ratio"), [((14, 14), 0.4), ((2, 3, 8), 0.75), ((1, 6, 7), 0.2)])
def test_blocks(grid, ratio):
    torch.manual_seed(3)
    masking = block_masking(3, grid, ratio)
    torch.manual_seed(3)
    *_, height, width = grid
    draws, hidden = torch.rand(3, 4, 32), int(ratio * height * width)
    by_hand = torch.stack([block_by_hand(draw, height, width, hidden) for draw in draws])
    assert_same(masking, by_hand_in_frames(by_hand[:, None].expand(-1, math.prod(grid[:-2]), -1, -1)))


def test_rectangles_that_do_not_suffice(monkeypatch):
    """The smallest draws give one place: then the whole grid is the last rectangle, cut from above."""
    monkeypatch.setattr("mae_kernels.masking._draw", lambda shape, *_: torch.zeros(shape))
    mask = block_masking(1, (6, 8), 0.75).mask.view(6, 8)
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[:2, :7] = True  # 16 patches of the aspect 0.3
    expected.view(-1)[torch.arange(48)[~expected.view(-1)][-22:]] = True
    assert torch.equal(mask, expected)


@pytest.mark.eager
def test_blocks_are_whole():
    """Three in four neighbours of a hidden patch are hidden; at random they are two in five."""
    mask = block_masking(1000, (14, 14), 0.4).mask.view(-1, 14, 14)
    beside = mask[:, :, 1:] & mask[:, :, :-1]
    assert beside.sum() / mask[:, :, 1:].sum() > 0.75


@pytest.mark.eager
def test_grids():
    for ratio in (0.25, 0.5, 0.75):
        hidden = grid_masking(4, (2, 4, 6), ratio).mask.view(4, 2, 2, 2, 3, 2)
        assert (hidden == hidden[:, :1, :1, :, :1, :]).all()
        assert (hidden[:, 0, 0, :, 0, :].flatten(1).sum(dim=1) == 4 * ratio).all()


@pytest.mark.eager
def test_grids_of_odd_sides():
    mask = grid_masking(200, (7, 5), 0.75).mask.view(200, 7, 5)
    places = [mask[:, row::2, column::2].flatten(1) for row in (0, 1) for column in (0, 1)]
    mixed = torch.stack([place.any(dim=1) & ~place.all(dim=1) for place in places])
    assert (mixed.sum(dim=0) <= 1).all()


@pytest.mark.eager
@pytest.mark.parametrize(
    ("grid", "share", "lines"),
    [((8, 5), (0, 0.5), (0, 2)), ((3, 4, 5), (0.4, 0.25, 0), (1, 1, 0)), ((6, 4), 0.5, (3, 2))],
)
def test_lines_of_an_axis(grid, share, lines):
    left = math.prod(side - hidden for side, hidden in zip(grid, lines, strict=True))
    for more in (0, 3):
        hidden = math.prod(grid) - left + more
        mask = axis_masking(4, grid, (hidden + 0.5) / math.prod(grid), share=share).mask.view(4, *grid)
        assert (mask.flatten(1).sum(dim=1) == hidden).all()
        for axis, expected in enumerate(lines):
            whole = mask.movedim(1 + axis, 1).flatten(2).all(dim=2).sum(dim=1)
            assert (whole == expected).all() if more == 0 else (whole >= expected).all()


@pytest.mark.eager
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_draw_from_their_generator(strategy):
    state = torch.get_rng_state()
    generator = torch.Generator(DEVICE).manual_seed(5)
    first = strategy(4, (2, 4, 6), 0.5, generator=generator, device=DEVICE)
    other = strategy(4, (2, 4, 6), 0.5, generator=generator, device=DEVICE)
    assert torch.equal(state, torch.get_rng_state())
    assert_same(strategy(4, (2, 4, 6), 0.5, generator=generator.manual_seed(5), device=DEVICE), first)
    assert not torch.equal(other.mask, first.mask)
    assert len({tuple(row) for row in torch.cat([first.mask, other.mask]).tolist()}) > 3


@pytest.mark.eager
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_read_nothing_back(strategy):
    with LaunchCounter() as counter:
        strategy(4, (2, 4, 6), 0.5)
    assert counter.syncs == 0
    masking = strategy(4, (2, 4, 6), 0.5, device="meta")  # where there is nothing to read
    assert {(x.device.type, *x.shape) for x in masking} == {("meta", 4, 24), ("meta", 4, 48)}


@pytest.mark.eager
def test_unequal_counts_are_not_read_back():
    masking = masking_from_mask(torch.ones(4, 9, dtype=torch.bool, device="meta"), num_keep=3)
    assert [(x.device.type, *x.shape) for x in masking] == [("meta", 4, x) for x in (3, 8, 9, 9)]


def all_strategies(n):
    scores = [strategy(n, (4, 6), 0.5) for strategy in STRATEGIES]
    return torch.cat([x.double() for masking in scores for x in masking], dim=1)


@pytest.mark.eager
def test_strategies_compile():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled = torch.compile(all_strategies, fullgraph=True, backend="aot_eager", dynamic=True)
        for n in (3, 5):
            torch.manual_seed(4)
            ours = compiled(n)
            torch.manual_seed(4)
            assert torch.equal(ours, all_strategies(n))


class Masks(torch.nn.Module):
    def forward(self, images, mask):
        masks = [strategy(images.shape[0], (4, 6), 0.5).mask for strategy in STRATEGIES]
        return torch.stack(masks), *masking_from_mask(mask, num_keep=12)


@pytest.mark.slow
@pytest.mark.eager
@pytest.mark.filterwarnings("ignore")
def test_strategies_in_onnx(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    n = torch.export.Dim("n", min=2, max=64)
    mask = block_masking(5, (4, 6), 0.6).mask.cpu()
    mask[1, :] = torch.arange(24) > 0
    with torch.device("cpu"), torch.no_grad():
        program = torch.onnx.export(
            Masks(), (torch.zeros(3, 1), mask[:3]), dynamo=True, verbose=False, dynamic_shapes=({0: n}, {0: n})
        )
    program.save(tmp_path / "masks.onnx")
    session = runtime.InferenceSession(tmp_path / "masks.onnx")
    fed = {"images": torch.zeros(5, 1).cpu().numpy(), "mask": mask.numpy()}
    masks, *padded = (
        torch.from_numpy(x) for x in session.run(None, {x.name: fed[x.name] for x in session.get_inputs()})
    )
    assert (masks.sum(dim=2) == 12).all()
    assert (masks.view(4, 5, 2, 2, 3, 2)[2] == masks.view(4, 5, 2, 2, 3, 2)[2][:, :1, :, :1]).all()
    assert_same(masking_from_mask(mask, num_keep=12), padded)
