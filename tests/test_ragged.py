"""Masks that leave each image its own number of visible patches: each image gets what it would get alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae import MAEConfig, MaskedAutoencoder
from mae.training.profile import LaunchCounter
from mae_kernels import Masking, masking_from_mask

CONFIG = MAEConfig(
    image_size=56, patch_size=8, embed_dim=32, depth=2, num_heads=4, decoder_embed_dim=16, decoder_depth=2,
    decoder_num_heads=2,
)  # fmt: skip
COUNTS, L = (3, 7, 20), 49


def padded(mask: Tensor, num_keep: int) -> Masking:
    """Row by row: ids of unequal counts with -1 behind them."""
    rows = []
    for row in mask:
        visible, hidden = ((row == which).nonzero()[:, 0] for which in (False, True))
        ids_restore = torch.empty(L, dtype=torch.int64)
        ids_restore[visible] = torch.arange(len(visible))
        ids_restore[hidden] = num_keep + torch.arange(len(hidden))
        ids = [F.pad(x, (0, n - len(x)), value=-1) for x, n in ((visible, num_keep), (hidden, L - 1))]
        rows.append([*ids, ids_restore])
    return Masking(*map(torch.stack, zip(*rows, strict=True)), mask)


@pytest.fixture
def model() -> MaskedAutoencoder:
    model = MaskedAutoencoder(CONFIG)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.randint(256, (3, 3, 56, 56), dtype=torch.uint8)


@pytest.fixture
def mask() -> Tensor:
    order = torch.rand(3, L).argsort(1)
    return order >= torch.tensor(COUNTS)[:, None]


def gradients(model, loss) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, [*trained.values()]), strict=True))


@pytest.mark.parametrize("num_keep", [20, 30], ids=["full", "with room"])
@pytest.mark.parametrize("touched", [False, True])
@pytest.mark.parametrize("return_pred", [False, True])
def test_each_image_gets_what_it_gets_alone(model, images, mask, num_keep, touched, return_pred):
    """Latents, predictions, loss and gradients, whether layers are passed over or called."""
    model.double()
    if touched:
        for module in model.modules():
            module.register_forward_hook(lambda *_: None)
    masking = padded(mask, num_keep)
    keys = F.pad(masking.ids_keep >= 0, (1, 0), value=True)
    latent = model.encode(model.embed(images, masking.ids_keep), keys)
    output = model(images, masking=masking, return_pred=return_pred)
    ours = gradients(model, output.loss)
    hidden = L - torch.tensor(COUNTS)
    loss, expected = 0, dict.fromkeys(ours, 0)
    for n, weight in enumerate((hidden / hidden.sum().double()).tolist()):
        alone = masking_from_mask(mask[n : n + 1])
        one = model(images[n : n + 1], masking=alone, return_pred=return_pred)
        loss = loss + weight * one.loss
        for name, g in gradients(model, one.loss).items():
            expected[name] = expected[name] + weight * g
        latent_alone = model.encode(model.embed(images[n : n + 1], alone.ids_keep))
        torch.testing.assert_close(latent[n, : 1 + COUNTS[n]], latent_alone[0], rtol=1e-12, atol=1e-12)
        if return_pred:
            torch.testing.assert_close(output.pred[n], one.pred[0], rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(output.loss, loss, rtol=1e-12, atol=0)
    for name, g in ours.items():
        assert (g - expected[name]).abs().max() <= 1e-12 * expected[name].abs().max(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model, images, mask, dtype):
    """As far from float32's as the images alone are."""

    def run(autocast: bool, alone: bool) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=autocast):
            if not alone:
                return model(images, masking=padded(mask, 20)).loss
            hidden = L - torch.tensor(COUNTS)
            pairs = zip(images, mask, strict=True)
            losses = [model(x[None], masking=masking_from_mask(m[None])).loss for x, m in pairs]
            return (torch.stack(losses) * hidden).sum() / hidden.sum()

    gold = run(False, False)
    ours, peer = run(True, False), run(True, True)
    torch.testing.assert_close(ours, peer, rtol=4 * torch.finfo(dtype).eps, atol=0)
    expected, found, apart = (gradients(model, loss) for loss in (gold, ours, peer))
    for name, g in expected.items():
        error, allowed = (found[name] - g).norm(), (apart[name] - g).norm()
        assert error <= 2 * allowed + torch.finfo(dtype).eps * g.norm(), name


def test_nothing_is_read_back_and_one_graph_holds_it(model, images, mask):
    masking = padded(mask, 20)
    with LaunchCounter() as counter:
        loss = model(images, masking=masking).loss
        loss.backward()
    assert counter.syncs == 0
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, masking=masking).loss, loss, rtol=1e-5, atol=0)


def test_pictures_show_each_mask(model, images, mask):
    pictures = model.reconstruct(images, masking=padded(mask, 20))
    hidden = mask.view(3, 1, 7, 1, 7, 1).expand(-1, 3, -1, 8, -1, 8).reshape(3, 3, 56, 56)
    assert (pictures.masked[hidden] == 0.5).all()
    assert torch.equal(pictures.reconstruction[~hidden], pictures.original[~hidden])
