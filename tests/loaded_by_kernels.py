"""Run with kernels on the path, in the folder that hub/make.py wrote, for test_hub.py: what loads from there works."""

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import kernels
import kernels.benchmark
import pytest
import torch
from kernels._rust import Build, Digest, DigestAlgorithm
from kernels.backends import CPU
from transformers import ViTMAEConfig, ViTMAEForPreTraining

import mae_kernels as installed


def ops_of(namespace: str) -> set[str]:
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    return {name for space, _, name in names if space == namespace}


def step(package) -> list[torch.Tensor]:
    """Loss and gradients of a small training step."""
    torch.manual_seed(0)
    images, m = torch.rand(3, 3, 32, 32), package.random_masking(3, 16)
    parameters = [torch.randn(size, requires_grad=True) for size in ((64, 3, 8, 8), (1, 16, 64), (1, 1, 64), (192, 64))]
    weight, pos_embed, token, head = parameters
    x = package.patch_embed(images, weight, None, pos_embed, m.ids_keep, prefix=token)
    x = package.scatter_mask_tokens(x, token, m.ids_restore, pos_embed)
    x = x + x.mean(dim=1, keepdim=True)  # as attention would, it tells hidden patches of visible ones
    loss = package.masked_mse((x @ head.t())[:, 1:], images, patch_size=8, mask=m.mask)
    return [loss, *torch.autograd.grad(loss, parameters)]


def applied_step(package) -> list[torch.Tensor]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTMAEForPreTraining(ViTMAEConfig(**sizes, **{f"decoder_{name}": n for name, n in sizes.items()}))
    report = package.apply(model)
    assert report.replaced
    assert not report.left
    loss = model(torch.rand(2, 3, 224, 224)).loss
    loss.backward()
    return [loss, *(p.grad for p in model.parameters() if p.requires_grad)]


loaded = kernels.get_kernel("OWNER/mae-kernels", version=0)
[kernel] = kernels.get_loaded_kernels()
build = Path(loaded.__file__).parent
assert build.parent.samefile("build")
assert set(Build.open(".").general.backends) == {
    kernels.Metadata.read_from_file(path).backend.backend_type for path in build.parent.glob("*/metadata.json")
}
kernel.metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, build))

assert loaded is not installed
assert ops_of("mae_kernels")
assert ops_of(kernel.metadata.id) == ops_of("mae_kernels")
with torch.profiler.profile() as profile:
    ours = step(loaded)
ran = {event.name.partition("::")[0] for event in profile.events() if "mae_kernels" in event.name}
assert ran == {kernel.metadata.id}
assert all(x.any() for x in ours)
assert all(map(torch.equal, ours, step(installed)))
assert all(map(torch.equal, applied_step(loaded), applied_step(installed)))

[snippet] = re.findall(r"```python\n(.*?)```", Path("build/CARD.md").read_text(encoding="utf-8"), re.DOTALL)
scope: dict = {}
exec(snippet, scope)
assert scope["mae"] is loaded
assert scope["x"].shape == (2, 197, 768)

# The command line of kernels imports more than a benchmark needs, and more than is installed here.
spec = spec_from_file_location("runner", Path(kernels.__file__).parent / "cli/benchmark.py")
runner = module_from_spec(spec)
spec.loader.exec_module(runner)
if not torch.cuda.is_available():
    runner._backend = CPU  # it would go by what PyTorch was built for
[benchmark] = runner.discover_benchmark_classes(Path("benchmarks/benchmark.py"), Path())
benchmark.batch_size = 2
times, _ = runner.run_benchmark_class(benchmark, iterations=1, warmup=0, repo_id=".", is_local=True, revision="local")
assert {name: time.verified for name, time in times.items()} == dict.fromkeys(
    ("patch_embed", "scatter_mask_tokens", "masked_mse"), True
)

raise SystemExit(pytest.main(["--quiet"]))
