"""Run by ``kernels benchmark``: ops of a training step, forward and backward, against PyTorch's own."""

import torch
from kernels.benchmark import Benchmark


class TrainingStep(Benchmark):
    """ViT-B/16 in float32 on images of 224 x 224 pixels, three quarters of them hidden."""

    seed = 0
    batch_size = 64

    def setup(self):
        n, random = self.batch_size, lambda *size: torch.randn(size, device=self.device)
        self.masking = self.kernel.random_masking(n, 196, device=self.device)
        self.images, self.weight, self.bias = random(n, 3, 224, 224), random(768, 3, 16, 16) / 28, random(768)
        self.pos_embed, self.token = random(1, 196, 768), random(1, 1, 768)
        self.visible, self.pred = random(n, 1 + 49, 768), random(n, 196, 768)
        for x in (self.weight, self.bias, self.token, self.visible, self.pred):
            x.requires_grad_()

    def benchmark_patch_embed(self):
        self.out = self._patch_embed(self.kernel)

    def verify_patch_embed(self) -> torch.Tensor:
        return self._patch_embed(self.kernel.reference)

    def benchmark_scatter_mask_tokens(self):
        self.out = self._scatter_mask_tokens(self.kernel)

    def verify_scatter_mask_tokens(self) -> torch.Tensor:
        return self._scatter_mask_tokens(self.kernel.reference)

    def benchmark_masked_mse(self):
        self.out = self._masked_mse(self.kernel)

    def verify_masked_mse(self) -> torch.Tensor:
        return self._masked_mse(self.kernel.reference)

    def _patch_embed(self, ops):
        ids_keep = self.masking.ids_keep
        out = ops.patch_embed(self.images, self.weight, self.bias, self.pos_embed, ids_keep, prefix=self.token)
        return _with_backward(out, self.weight, self.bias, self.token)

    def _scatter_mask_tokens(self, ops):
        out = ops.scatter_mask_tokens(self.visible, self.token, self.masking.ids_restore, self.pos_embed)
        return _with_backward(out, self.visible, self.token)

    def _masked_mse(self, ops):
        return _with_backward(ops.masked_mse(self.pred, self.images, patch_size=16, mask=self.masking.mask), self.pred)


def _with_backward(out, *parameters):
    torch.autograd.grad(out, parameters, torch.ones_like(out))
    return out
