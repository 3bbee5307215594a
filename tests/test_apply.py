"""apply and unapply: the same numbers, random stream, parameters and habits, on the fused ops."""

import copy
import inspect
import io
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import DEVICE
from families import FAMILIES, Calls, distance, hugging_face, images, is_a_key_bias, outcome, published, train
from torch import Tensor, nn

from mae_kernels import apply, unapply, use_backend


@pytest.fixture(params=FAMILIES)
def model(request) -> nn.Module:
    return FAMILIES[request.param]().to(DEVICE)


def assert_close(result: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, x in result.items():
        query = name.replace("key.bias", "query.bias").replace("k_proj.bias", "q_proj.bias")
        assert distance(x, expected[name], expected[query]) < 1e-5, name


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_same_numbers(model, training):
    ours = copy.deepcopy(model).train(training)
    report = apply(ours)
    assert report.replaced
    assert not report.left
    batch = images(device=DEVICE)
    expected, result = train(model.train(training), batch), train(ours, batch)
    assert result.keys() == expected.keys()
    if "mask" in result:
        assert torch.equal(result["mask"], expected["mask"])
        assert result["mask"].dtype == expected["mask"].dtype
    assert_close(result, expected)


# Whether pixels are normalised is left to one family each: the methods of a family pass it on to the same op.
@pytest.mark.parametrize(
    "model", [name for name in FAMILIES if name not in ("published", "Hugging Face, plain pixels")], indirect=True
)
def test_same_numbers_from_the_kernels(model):
    """Without a GPU in Triton's interpreter."""
    ours, batch = copy.deepcopy(model), images(2, DEVICE)
    apply(ours)
    expected = train(model, batch)
    with use_backend("triton"):
        assert_close(train(ours, batch), expected)


def test_methods_are_tried_on_the_kernels():
    with use_backend("triton"):
        assert not apply(published().to(DEVICE)).left


def test_bfloat16_is_no_worse(model):
    batch = images(device=DEVICE)
    gold = train(copy.deepcopy(model).double(), batch.double())
    ours = copy.deepcopy(model)
    apply(ours)
    with torch.autocast(DEVICE, torch.bfloat16):
        same, result = train(model, batch), train(ours, batch)
    for name, x in result.items():
        assert x.dtype == same[name].dtype, name
        if not is_a_key_bias(name) and name != "mask":
            assert distance(x, gold[name]) < 2 * distance(same[name], gold[name]) + 2**-8, name


def test_a_bfloat16_model_is_no_worse(model):
    model, batch = model.bfloat16(), images(device=DEVICE).bfloat16()
    gold, ours = train(copy.deepcopy(model).double(), batch.double()), copy.deepcopy(model)
    apply(ours)
    same, result = train(model, batch), train(ours, batch)
    for name, x in result.items():
        assert x.dtype == same[name].dtype, name
        if not is_a_key_bias(name) and name != "mask":
            assert distance(x, gold[name]) < 2 * distance(same[name], gold[name]) + 2**-6, name


def test_ten_steps_stay_together(model):
    batches = [images(device=DEVICE) for _ in range(10)]

    def losses(model: nn.Module, applied: bool) -> Tensor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)  # made before, as scripts do
        if applied:
            apply(model)
        result = []
        torch.manual_seed(3)
        for batch in batches:
            loss = outcome(model, batch)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            result.append(loss.detach())
        return torch.stack(result)

    ours = losses(copy.deepcopy(model), applied=True)
    expected = losses(model, applied=False)
    assert expected[-1] != expected[0]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)


def test_the_ops_run(model):
    report = apply(model)
    with Calls() as calls:
        outcome(model, images(device=DEVICE))
    promised = {op for change in report.replaced for op in change.ops}
    kernels = {"random_masking": "masking"}
    assert {f"mae_kernels::{kernels.get(op, op)}" for op in promised} <= set(calls.names)
    assert "aten::convolution" not in calls.names
    unapply(model)
    with Calls() as calls:
        outcome(model, images(device=DEVICE))
    assert not any(name.startswith("mae_kernels") for name in calls.names)


def test_unapply_restores_the_very_same_objects(model):
    def things() -> list:
        found = [type(m) for m in model.modules()] + [id(m) for m in model.modules()]
        found += [(name, id(x)) for name, x in model.state_dict(keep_vars=True).items()]
        return found + [{key: id(value) for key, value in vars(m).items() if key[0] != "_"} for m in model.modules()]

    before = things()
    apply(model)
    assert things() != before
    apply(model)  # once more changes nothing
    unapply(model)
    assert things() == before
    unapply(model)
    assert things() == before


def test_parameters_keys_modes_and_class_stay(model):
    parameters = {name: id(p) for name, p in model.named_parameters()}
    keys, cls = list(model.state_dict()), type(model)
    modes = [i % 2 == 0 for i, _ in enumerate(model.modules())]
    for part, mode in zip(model.modules(), modes, strict=True):
        part.training = mode
    apply(model)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert list(model.state_dict()) == keys
    assert [part.training for part in model.modules()] == modes
    assert isinstance(model, cls)
    assert type(model).__name__ == cls.__name__
    assert repr(model) == repr(unapplied(model))
    assert inspect.signature(model.forward) == inspect.signature(cls.forward.__get__(model))


def unapplied(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    unapply(model)
    return model


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("clone", [copied, pickled, saved])
def test_copies_are_applied_too(model, clone):
    apply(model)
    twin = clone(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    batch = images(device=DEVICE)
    expected, result = train(model, batch), train(twin, batch)
    assert all(torch.equal(result[name], expected[name]) for name in expected)
    with torch.no_grad():  # no parameter is shared, and the copy uses its own
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(train(model, batch)["loss"], expected["loss"])
    assert train(twin, batch)["loss"] != expected["loss"]
    unapply(twin)
    assert [type(m) for m in twin.modules()] == [type(m) for m in unapplied(model).modules()]


def test_apply_disturbs_nothing(model):
    model.register_buffer("calls", torch.zeros((), device=DEVICE))
    seen = []
    handles = [part.register_forward_hook(lambda *_: seen.append(1)) for part in model.modules()]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    apply(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not seen
    outcome(model, images(device=DEVICE))
    assert seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("wrap", ["inside", "compiled"])
def test_inside_other_modules(wrap):
    model = published().to(DEVICE)
    expected = train(copy.deepcopy(model), batch := images(device=DEVICE))
    outer = nn.ModuleDict({"mae": model}) if wrap == "inside" else torch.compile(model, backend="eager")
    report = apply(outer)
    assert report.replaced[0].module == ("mae" if wrap == "inside" else "_orig_mod")
    assert distance(train(model, batch)["pred"], expected["pred"]) < 1e-5


# Most of the tracing is that of attention: one block shows the loop over blocks.
@pytest.mark.parametrize(
    ("build", "options"),
    [
        (published, {"depth": 0, "decoder_depth": 1}),
        pytest.param(hugging_face, {"num_hidden_layers": 0, "decoder_num_hidden_layers": 1}, marks=pytest.mark.slow),
    ],
    ids=["published", "Hugging Face"],
)
def test_compiles_to_one_graph(build, options):
    model = build(**options).to(DEVICE)
    apply(model)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
        for n in (5, 7):  # not 3: it would share the symbol of the channels
            batch = images(n, DEVICE)
            expected, result = train(model, batch), train(compiled, batch)
            assert distance(result["loss"], expected["loss"]) < 1e-6


def test_importing_mae_kernels_imports_no_model_package():
    code = "import sys, mae_kernels; print(*{'transformers', 'timm', 'lightly'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_a_hook_on_the_projection_is_called(model):
    apply(model)
    seen = []
    projection = next(part for part in model.modules() if isinstance(part, nn.Conv2d))
    projection.register_forward_hook(lambda *_: seen.append(1))
    outcome(model, images(device=DEVICE))
    assert seen
