"""Each op at sizes that hypothesis draws, against its definition."""

import sys

import pytest
import torch
from cases import compare, crop_inputs, head_inputs, ids, loss_inputs, patch_embed_inputs, scatter_inputs, tokens
from test_gather_tokens import EXACT
from test_linear_masked_mse import check as check_head
from test_masked_mse import check as check_loss
from test_masking import assert_same
from test_patch_embed import check as check_patch_embed
from test_random_resized_crop import assert_right
from test_scatter_mask_tokens import ALL

from mae_kernels import gather_tokens, random_masking, reference, scatter_mask_tokens

pytest.importorskip("hypothesis")  # a machine that is lent may have less than others

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("poisoned_empty", "backend")

# On a GPU each example compiles kernels. The fixture that poisons memory serves all examples of a test alike.
any_size = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
GRIDS, PATCHES = st.tuples(*[st.integers(1, 5)] * 2), st.tuples(*[st.integers(1, 6)] * 2)
SEEDS = st.integers(0, 2**32)

MODULE = sys.modules["mae_kernels.linear_masked_mse"]  # in the package the function has its name


@any_size
@given(st.integers(1, 5), st.integers(1, 30), st.integers(1, 30), st.integers(1, 40), SEEDS)
def test_gather_tokens(n, num_tokens, k, d, seed):
    torch.manual_seed(seed)
    k = min(k, num_tokens)
    inputs = {"tokens": tokens(n, num_tokens, d), "ids": ids(n, num_tokens, k)}
    compare(gather_tokens, reference.gather_tokens, inputs, tokens(n, k, d), **EXACT)


@any_size
@given(st.integers(1, 4), st.integers(1, 4), GRIDS, PATCHES, st.integers(1, 5), st.integers(1, 9), st.booleans(), SEEDS)
def test_linear_masked_mse(n, step, grid, patch, c, d, bias, seed):
    torch.manual_seed(seed)
    inputs = head_inputs(n, grid, patch, c, d, bias=bias, norm_pix=c * patch[0] * patch[1] > 3)
    with pytest.MonkeyPatch.context() as context:
        context.setattr(MODULE, "chunk_samples", lambda *sizes: step)
        check_head(inputs)


@any_size
@given(st.integers(1, 4), GRIDS, PATCHES, st.integers(1, 5), st.integers(1, 25), st.booleans(), st.booleans(), SEEDS)
def test_masked_mse(n, grid, patch, c, masked, by_mask, published_layout, seed):
    torch.manual_seed(seed)
    check_loss(
        loss_inputs(
            n,
            grid,
            patch,
            c,
            masked=min(masked, grid[0] * grid[1]),
            by="mask" if by_mask else "ids_mask",
            layout="channels_last" if published_layout else "channels_first",
            norm_pix=c * patch[0] * patch[1] > 3,
        )
    )


@any_size
@given(st.integers(1, 5), st.integers(2, 60), st.integers(1, 59), st.integers(1, 6), SEEDS)
def test_masking(n, num_patches, hidden, levels, seed):
    torch.manual_seed(seed)
    noise = torch.randint(levels, (n, num_patches)).float()
    ratio = (hidden % (num_patches - 1) + 1 - 0.5) / num_patches  # hides at least one and leaves one
    ours = random_masking(n, num_patches, ratio, noise=noise)
    assert_same(ours, reference.random_masking(n, num_patches, ratio, noise=noise))


@any_size
@given(
    st.integers(1, 4),
    GRIDS,
    PATCHES,
    st.integers(1, 5),
    st.integers(1, 25),
    st.integers(1, 40),
    st.integers(0, 3),
    SEEDS,
)
def test_patch_embed(n, grid, patch, c, k, d, r, seed):
    torch.manual_seed(seed)
    check_patch_embed(patch_embed_inputs(n, grid, patch, c, d, k=min(k, grid[0] * grid[1]), r=r, norm=seed % 2 == 0))


@any_size
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 20), st.integers(2, 40), SEEDS)
def test_random_resized_crop(height, width, out_height, out_width, seed):
    torch.manual_seed(seed)
    assert_right(**crop_inputs(1, 1, height, width, (out_height, out_width)))


@any_size
@given(st.integers(1, 5), st.integers(2, 30), st.integers(1, 30), st.integers(1, 40), st.integers(0, 3), SEEDS)
def test_scatter_mask_tokens(n, num_patches, k, d, r, seed):
    torch.manual_seed(seed)
    inputs = scatter_inputs(n, num_patches, min(k, num_patches), d, r, pos=num_patches + r * (seed % 2))
    grad = tokens(n, r + num_patches, d)
    compare(scatter_mask_tokens, reference.scatter_mask_tokens, inputs, grad, ALL, exact=("value", "tokens"))
