"""Linear probing: a frozen encoder, a normalisation as PyTorch's in any number of processes, and its optimizers."""

import math
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import CONTEXT
from runs import ALL, HEAD, classifier, finetune_config, images, labels, losses, weights
from torch import Tensor, nn

from mae import Classifier, HeadConfig, load_checkpoint
from mae.data import Batches, TensorImages
from mae.training.classification import BatchNorm, ProbeTraining, finetuning, folded, probing
from mae.training.loop import train
from mae.training.optimizers import lars, sgd
from mae.training.parallel import Processes

TOKEN, MEAN = HeadConfig(HEAD.classes, "token"), HeadConfig(HEAD.classes, "mean")
TIMEOUT = 120  # seconds; only reached when a process has died
FEATURES = 3 + 2 * torch.randn(5, 8, 96, generator=torch.Generator().manual_seed(2))  # of five steps


def probe_config(steps: int = 12, **options) -> ProbeTraining:
    shared = {"batch_size": 8, "base_lr": 3.2, "device": "cpu", "log_every": 1, "workers": 0, "eval_every": 10**6}
    return ProbeTraining(steps=steps, **shared | options)


def probe(run: Path, head: HeadConfig = TOKEN, solver: str = "sgd", **options) -> Classifier:
    model, config = classifier(head=head), probe_config(**options)
    train(model, images(), config, run, task=probing(model, config, labels(), solver=solver))
    return model


@pytest.mark.parametrize("head", [TOKEN, MEAN], ids=lambda head: head.pool)
def test_only_the_head_is_trained_on_what_it_looks_at(tmp_path, head):
    model, start = probe(tmp_path, head, steps=10), classifier(head=head)
    state, before = model.state_dict(), start.state_dict()
    encoder = {name for name in before if not name.startswith("head.")}
    assert encoder == {name for name in state if not name.startswith("head.")}
    assert all(torch.equal(state[name], before[name]) for name in encoder)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.1.weight", "head.1.bias"}
    first, last = losses(tmp_path)[0][1], losses(tmp_path)[-1][1]
    assert first == pytest.approx(math.log(5), abs=0.15)
    assert last < first - 0.03

    tokens = [start.forward_features(batch.images) for batch in Batches(images(), 8, range(10))]
    features = [x[:, 0] if head.pool == "token" else x[:, 1:].mean(1) for x in tokens]
    expected = torch.stack([x.mean(0) for x in features]).mean(0)  # of the first ten batches, which count alike
    torch.testing.assert_close(model.head[0].running_mean, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", [TOKEN, MEAN], ids=lambda head: head.pool)
def test_what_is_saved_is_one_linear_layer_of_the_same_logits(tmp_path, head):
    model, pixels = probe(tmp_path, head).eval(), images(16).images
    loaded = load_checkpoint(tmp_path)
    assert loaded.head_config == head
    assert weights(tmp_path).keys() == classifier(head=head).state_dict().keys()
    with torch.no_grad():
        expected = model(pixels)
        torch.testing.assert_close(loaded(pixels), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert expected.std() > 0.1


def test_folding_changes_nothing_but_rounding():
    head = nn.Sequential(BatchNorm(96, affine=False, eps=1e-6), nn.Linear(96, 5)).eval()
    head[0].running_mean.normal_()
    head[0].running_var.uniform_(0.01, 4)
    x = torch.randn(7, 96)
    logits = head(x)
    head.double()
    state = folded({f"head.{name}": x for name, x in head.state_dict().items()} | {"other": torch.ones(1)})
    assert state.keys() == {"head.weight", "head.bias", "other"}
    x = x.double()
    expected = head[1]((x - head[0].running_mean) / (head[0].running_var + 1e-6).sqrt())
    torch.testing.assert_close(F.linear(x, state["head.weight"], state["head.bias"]), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


def test_batches_that_are_not_finite_leave_the_statistics_as_they_are(tmp_path):
    pixels = torch.rand(40, 1, 28, 28)
    pixels[7] = math.nan
    model, config = classifier(head=TOKEN), probe_config(steps=10)
    history = train(model, TensorImages(pixels), config, tmp_path, task=probing(model, config, labels()))
    assert history[-1]["skipped"] == 2
    assert all(x.isfinite().all() for x in weights(tmp_path).values())
    features = [
        classifier(head=TOKEN).features(batch.images)
        for batch in Batches(TensorImages(pixels), 8, range(10)) if 7 not in batch.numbers
    ]  # fmt: skip
    expected = torch.stack([x.var(0) for x in features]).mean(0)  # the first ten count alike
    torch.testing.assert_close(model.head[0].running_var, expected, rtol=1e-5, atol=1e-6)


def test_statistics_begin_with_the_first_batches_and_go_on_as_pytorchs():
    ours, theirs = (x(3, affine=False, eps=1e-6) for x in (BatchNorm, nn.BatchNorm1d))
    batches = 0.05 * torch.randn(30, 8, 3) + 4
    for batch in batches[:10]:
        ours(batch)
    torch.testing.assert_close(ours.running_mean, batches[:10].mean((0, 1)))
    torch.testing.assert_close(ours.running_var, batches[:10].var(1).mean(0))
    theirs.load_state_dict(ours.state_dict())
    for batch in batches[10:]:
        torch.testing.assert_close(ours(batch), theirs(batch), rtol=1e-3, atol=1e-4)  # a variance of 0.0025
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_batches_of_one_image_and_sharding_are_refused():
    with pytest.raises(ValueError, match="normalises features over the batch, so batch_size must be 2 at least, got 1"):
        probing(classifier(head=TOKEN), probe_config(batch_size=1), labels())
    with pytest.raises(ValueError, match="parallel fsdp shards what is trained, and a probe trains one layer"):
        probing(classifier(head=TOKEN), probe_config(parallel="fsdp"), labels())


def normalised(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    norm = BatchNorm(96, affine=False, eps=1e-6)
    return torch.stack([norm(x[rows]) for x in FEATURES]), norm.running_mean, norm.running_var


def fine_tuned(run: Path, processes: Processes, **options) -> Path:
    config = finetune_config(6, **ALL, **options)
    model = classifier(drop_path=config.drop_path)
    train(model, images(), config, run, task=finetuning(model, config, labels(), processes), processes=processes)
    return run


RUNS = {"ddp": {"micro_batches": 2}, "fsdp": {}}


def _process(rank: int, folder: Path, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    try:
        norms = [None] * 2
        dist.all_gather_object(norms, [x.numpy() for x in normalised(slice(4 * rank, 4 * rank + 4))])
        for parallel, options in RUNS.items():
            fine_tuned(folder / parallel, Processes(rank, 2), parallel=parallel, **options)
        result = norms
    except Exception:
        result = traceback.format_exc()
    if rank == 0:
        queue.put(result)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> tuple[Path, list]:
    """What each makes of its half of the features, and runs of both together in a folder."""
    folder = tmp_path_factory.mktemp("processes")
    queue = CONTEXT.Queue()
    processes = [CONTEXT.Process(target=_process, args=(rank, folder, queue), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    result = queue.get(timeout=TIMEOUT)
    for process in processes:
        process.join()
    assert not isinstance(result, str), result
    return folder, [[torch.from_numpy(x) for x in norms] for norms in result]


def test_two_processes_normalise_over_the_whole_batch(two_processes):
    (first, *statistics), (second, *others) = two_processes[1]
    norm = nn.BatchNorm1d(96, affine=False, eps=1e-6)
    expected = torch.stack([norm(x) for x in FEATURES])
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(torch.cat([first, second], dim=1), expected, **close)
    for ours in (statistics, others):
        torch.testing.assert_close(ours, [*normalised(slice(None))[1:]], **close)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", RUNS)
def test_two_processes_fine_tune_as_one(two_processes, tmp_path, parallel):
    alone, run = fine_tuned(tmp_path, Processes()), two_processes[0] / parallel
    assert [loss for _, loss in losses(run)] == pytest.approx([loss for _, loss in losses(alone)], rel=1e-5)
    ours, expected = weights(run), weights(alone)
    assert ours.keys() == expected.keys()
    start = classifier().state_dict()
    for name, x in expected.items():
        off, moved = ours[name] - x, x - start[name]
        if name.endswith("qkv.bias"):  # the gradient of keys' biases is 0 but for rounding, of which AdamW makes steps
            off[96:192] = 0
        assert off.norm() <= 1e-3 * moved.norm(), name


def layer_and_gradients() -> tuple[nn.Linear, list[list[Tensor]]]:
    torch.manual_seed(0)
    layer = nn.Linear(6, 3)
    return layer, [[torch.randn_like(p) for p in layer.parameters()] for _ in range(5)]


def stepped(optimizer: torch.optim.Optimizer, gradients: list[list[Tensor]]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, step in enumerate(gradients):
        for p, gradient in zip(parameters, step, strict=True):
            p.grad = gradient.clone()
        for group in optimizer.param_groups:
            group["lr"] = 2.0 / (1 + i)
        optimizer.step()


def test_lars_is_the_published_rule():
    layer, gradients = layer_and_gradients()
    other, _ = layer_and_gradients()
    optimizer = lars(layer, 1.0, weight_decay=0.1)
    stepped(optimizer, gradients)
    momenta = {name: torch.zeros_like(p) for name, p in other.named_parameters()}
    for i, step in enumerate(gradients):
        for (name, p), gradient in zip(other.named_parameters(), step, strict=True):
            if name == "weight":
                gradient = gradient + 0.1 * p.data
                gradient = gradient * 0.001 * p.data.norm() / gradient.norm()
            momenta[name] = 0.9 * momenta[name] + gradient
            p.data -= 2.0 / (1 + i) * momenta[name]
    torch.testing.assert_close(layer.state_dict(), other.state_dict(), rtol=1e-6, atol=1e-7)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1]


@pytest.mark.parametrize("optimizer", [sgd, lars])
def test_a_scaled_loss_makes_the_same_steps(optimizer):
    layers = [layer_and_gradients()[0] for _ in range(2)]
    ours, other = (optimizer(layer, 1.0, weight_decay=0.1) for layer in layers)
    scaler, x = torch.amp.GradScaler("cpu", init_scale=4096.0), torch.randn(4, 6)
    for step in range(3):
        for layer in layers:
            loss = (layer(x) if step else layer(x) * math.inf).square().sum()  # the first is left out
            (scaler.scale(loss) if layer is layers[0] else loss).backward()
        scaler.step(ours)
        scaler.update()
        if step:
            other.step()
        for layer in layers:
            layer.zero_grad()
    torch.testing.assert_close(layers[0].state_dict(), layers[1].state_dict(), rtol=1e-5, atol=1e-6)


def test_lars_of_a_matrix_of_zeros_is_sgd():
    layer, gradients = layer_and_gradients()
    layer.weight.data.zero_()
    stepped(lars(layer, 1.0), gradients[:1])
    assert torch.equal(layer.weight, -2.0 * gradients[0][0])


def test_sgd_is_pytorchs():
    layer, gradients = layer_and_gradients()
    other, _ = layer_and_gradients()
    stepped(sgd(layer, 1.0, weight_decay=0.1), gradients)
    stepped(torch.optim.SGD(other.parameters(), 1.0, momentum=0.9, weight_decay=0.1), gradients)
    torch.testing.assert_close(layer.state_dict(), other.state_dict(), rtol=1e-6, atol=1e-6)
