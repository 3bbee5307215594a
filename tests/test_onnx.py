"""Programs that leave PyTorch: what the ops decompose into, and ONNX's runtime on exported models."""

import pytest
import torch
from cases import dispatcher_calls
from families import SIZE, hugging_face
from torch import Tensor, nn

from mae import MAEConfig, MaskedAutoencoder
from mae_kernels import apply, decompositions

CALLS = {f"{str(op).partition('.')[2]} {i}": (op, args) for i, (op, *args) in enumerate(dispatcher_calls())}
# Gradients, what is done to images before they reach a model, and products that are PyTorch's own in an export.
LEFT = ("backward", "random_resized_crop", "linear ", "weight_gradient")


@pytest.mark.parametrize("name", [name for name in CALLS if not any(left in name for left in LEFT)])
def test_decompositions_compute_what_the_ops_do(name):
    op, args = CALLS[name]
    expected, ours = op(*args), getattr(decompositions, name.split()[0])(*args)
    assert decompositions.table()[op.default] is decompositions.BY_NAME[name.split()[0]]
    half = any(isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) for x in args)
    half |= any(x in (torch.bfloat16, torch.float16) for x in args if isinstance(x, torch.dtype))
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if half else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(ours, expected, **tolerance)


class Features(nn.Module):
    def __init__(self, model: MaskedAutoencoder):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images)


class Pretraining(nn.Module):
    """Loss and mask of either model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(images, noise=noise)
        return output.loss, output.mask


def ours() -> MaskedAutoencoder:
    config = MAEConfig(
        image_size=SIZE, patch_size=8, embed_dim=32, depth=1, num_heads=4, decoder_embed_dim=16, decoder_depth=1,
        decoder_num_heads=2,
    )  # fmt: skip
    return MaskedAutoencoder(config)


def applied() -> nn.Module:
    model = hugging_face()
    assert len(apply(model).replaced) >= 4
    return model


def images(n: int, dtype: torch.dtype) -> Tensor:
    pixels = torch.randint(256, (n, 3, SIZE, SIZE), dtype=torch.uint8)
    return pixels if dtype == torch.uint8 else pixels / 128 - 1


def test_an_exported_program_decomposes():
    model, pixels = Features(ours()).eval(), images(2, torch.uint8)
    program = torch.export.export(model, (pixels,))
    assert "mae_kernels" in str(program.graph)
    table = {**torch.export.default_decompositions(), **decompositions.table()}
    program = program.run_decompositions(table)
    assert "mae_kernels" not in str(program.graph)
    torch.testing.assert_close(program.module()(pixels), model(pixels), rtol=1e-4, atol=1e-5)


# A model, the dtype of its images (the first one embeds floats, the second one bytes), and whether it takes noise.
EXPORTED = {
    "features": (lambda: Features(ours()), torch.float32, False),
    "pre-training": (lambda: Pretraining(ours()), torch.uint8, True),
    "an applied model": (lambda: Pretraining(applied()), torch.float32, True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["pre-training", *(pytest.param(x, marks=pytest.mark.slow) for x in ("features", "an applied model"))]
)
def test_onnx_computes_what_the_model_does(name, tmp_path):
    """For any number of images."""
    runtime = pytest.importorskip("onnxruntime")
    build, dtype, takes_noise = EXPORTED[name]
    torch.manual_seed(0)
    model, file = build().eval(), tmp_path / "model.onnx"

    def inputs(n: int) -> tuple[Tensor, ...]:
        return (images(n, dtype), torch.rand(n, (SIZE // 8) ** 2))[: 1 + takes_noise]

    n = torch.export.Dim("n", min=2, max=64)
    with torch.no_grad():
        program = torch.onnx.export(
            model, inputs(3), dynamo=True, verbose=False, dynamic_shapes=({0: n},) * (1 + takes_noise)
        )
    program.save(file)
    session = runtime.InferenceSession(file)
    for batch in (inputs(3), inputs(5)):
        fed = {x.name: value.numpy() for x, value in zip(session.get_inputs(), batch, strict=True)}
        found = [torch.from_numpy(x) for x in session.run(None, fed)]
        with torch.no_grad():
            expected = model(*batch)
        for x, y in zip(found, expected if takes_noise else [expected], strict=True):
            torch.testing.assert_close(x.to(y.dtype).view(y.shape), y, rtol=1e-4, atol=1e-4)
