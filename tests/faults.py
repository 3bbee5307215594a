"""Faults planted in the code, one at a time, each of which the tests must notice: ``python tests/faults.py``."""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT = 60  # seconds, within which the tests of a fault must notice it


@dataclass(frozen=True)
class Fault:
    name: str
    file: str  # relative to the repository
    right: str  # stands once in the file
    wrong: str
    tests: str  # arguments of pytest, in this folder


def room(file: str, tests: str, *faults: tuple[str, str, str]) -> list[Fault]:
    """Faults ``(name, right, wrong)`` of one file that the same tests notice."""
    return [Fault(name, file, right, wrong, tests) for name, right, wrong in faults]


KERNELS = [
    *room("mae_kernels/kernels/gather_tokens.py", "test_gather_tokens.py -k 'sizes and triton'",
        ("an index off by one", "n * s_tn + ids * s_tl", "n * s_tn + (ids + 1) * s_tl")),
    *room("mae_kernels/kernels/gather_tokens.py", "test_kernels.py -k 'outside_the_outputs or out_of_range'",
        ("a missing mask", "x, mask=m_i[:, None] & m_d)", "x, mask=m_i[:, None])"),
        ("an id out of range is read", "(ids >= 0) & (ids < num_tokens)", "ids >= 0")),
    *room("mae_kernels/kernels/masking.py", "test_kernels.py test_masking.py -k 'any_value or ties and triton'",
        ("ties go to the higher index", "| i.to(tl.uint64)", "| (BLOCK - 1 - i).to(tl.uint64)"),
        ("-0.0 sorts before 0.0", ".to(tl.float32) + 0.0", ".to(tl.float32)")),
    *room("mae_kernels/kernels/scatter_mask_tokens.py", "test_scatter_mask_tokens.py -k 'sizes and triton'",
        ("visible tokens count as masked", "tl.where(is_token[:, None], 0, g", "(g"),
        ("a position too far", "(j - first_pos) * s_pl", "j * s_pl")),
    *room("mae_kernels/kernels/scatter_mask_tokens.py", "test_scatter_mask_tokens.py -k 'gradient_strides and triton'",
        ("a wrong stride", "n * s_gn + j * s_gl", "n * s_gn + j * D")),
    *room("mae_kernels/kernels/masked_mse.py", "test_masked_mse.py -k 'sizes and triton'",
        ("a biased variance", "moment / (E - 1)", "moment / E"),
        ("eps outside the root", "sqrt_rn(moment / (E - 1) + eps_of_variance)",
         "sqrt_rn(moment / (E - 1)) + eps_of_variance")),
    *room("mae_kernels/kernels/masked_mse.py", "test_masked_mse.py -k '(nothing_masked or pixels_are) and triton'",
        ("nothing masked is a division by zero", "tl.maximum(tl.sum(counts), 1)", "tl.sum(counts)"),
        ("a gradient computed again without its scale", "* tl.load(p_scale)\n    #", "\n    #")),
    *room("mae_kernels/kernels/masked_mse.py", "test_kernels.py test_strides.py -k 'flat_patch or layout and mse'",
        ("a mean that rounds", "x -= pivot", "pivot = tl.zeros([BLOCK, 1], tl.float32)"),
        ("a strided mean", "statistics.contiguous()", "statistics")),
    *room("mae_kernels/kernels/pixels.py", "test_patch_embed.py -k 'pixels and triton'",
        ("a swapped layout", "    if CHANNELS_LAST:", "    if not CHANNELS_LAST:"),
        ("uint8 divided by 256", "(1 / 255)", "(1 / 256)"),
        ("the mean of another channel", "tl.load(p_statistics + c,", "tl.load(p_statistics + 0 * c,"),
        ("a patch turned over", "e // PW % (PT * PH), e % PW",
         "e % PW, e // PW % (PT * PH)")),
    *room("mae_kernels/kernels/pixels.py", "test_kernels.py -k more_than_32_bits",
        ("an offset of a pixel that wraps", "if not WIDE:", "if True:")),
    *room("mae_kernels/kernels/patch_embed.py", "test_kernels.py test_patch_embed.py -k 'splits or sizes and triton'",
        ("the position of another patch", "patch[:, None] * s_pl", "(j - num_prefix)[:, None] * s_pl"),
        ("a prefix row too many", "m_i & (j < num_prefix)", "m_i & (j <= num_prefix)"),
        ("a sample counted in two splits", "tl.minimum(first + samples_per_split,",
         "tl.minimum(first + samples_per_split + 1,")),
    *room("mae_kernels/kernels/random_resized_crop.py", "test_random_resized_crop.py -k triton",
        ("weights beside the box", "(source >= 0) & (source < length)", "source >= 0"),
        ("weights that are not those of an enlarged filter", "inverse_y = 1 / stretch", "inverse_y = 1.0"),
        ("a picture that is not flipped", "tl.load(p_flips + n * s_fn)", "n < 0"),
        ("a channel too many of a group", "(c < channels) & (y < out_height)", "y < out_height"),
        ("the lower halves of weights left out", "tl.dot(lower, pixels, tl.dot(upper, pixels, narrow))",
         "tl.dot(upper, pixels, narrow)"),
        ("rows of filters summed once for each block of columns", "tl.where(first_x == begin_x, weights_y, 0)",
         "weights_y")),
    *room("mae_kernels/kernels/random_resized_crop.py", "test_kernels.py -k outside",
        ("a place beside the box is read", "tl.minimum(source_x, box_width - 1)", "source_x")),
    *room("mae_kernels/kernels/random_resized_crop.py", "test_kernels.py -k bits_apart",
        ("offsets of 32 bits for channels further apart", "WIDE=last >= 2**31", "WIDE=False")),
    *room("mae_kernels/kernels/masked_mse.py", "test_kernels.py -k adjacent",
        ("strided predictions said to be adjacent", "if s_pe == 1 and not", "if not")),
    *room("mae_kernels/kernels/numerics.py", "test_kernels.py -k half_precision",
        ("rounding towards zero", "bits + 0x7FFF + ((bits >> 16) & 1)", "bits")),
]  # fmt: skip

ANY_INPUT = [
    *room("mae_kernels/kernels/pixels.py", "test_any_input.py -k 'masked_mse and triton and video'",
        ("frames in the place of rows", "(row // PH).to(tl.int64) * s_t", "(row % PH).to(tl.int64) * s_t")),
    *room("mae_kernels/kernels/masked_mse.py", "test_any_input.py -k 'masked_mse and triton and 13'",
        ("channels first read as last", "first_value = group if CHANNELS_LAST else group * E", "first_value = group")),
    *room("mae_kernels/kernels/masked_mse.py", "test_any_input.py -k 'not_scored and triton'",
        ("patches of no id are counted", "count += m_pred.to(tl.int32)", "count += m_i.to(tl.int32)")),
    *room("mae_kernels/kernels/scatter_mask_tokens.py", "test_any_input.py -k 'nobody_reads and triton'",
        ("a gradient that is not written", "(is_token | is_unread)[:, None]", "is_token[:, None]")),
    *room("mae_kernels/kernels/patch_embed.py", "test_any_input.py -k 'no_token and triton'",
        ("no patch has a bias", "is_patch = is_patch & (patch >= 0)", "is_patch = is_patch")),
    *room("mae_kernels/masked_mse.py", "test_any_input.py -k 'eager or by_hand'",
        ("no patch is scored", "residual.masked_fill_(padding, 0)", "pass"),
        ("eps of a channel inside the root", "(0.0, self.eps) if", "(self.eps, 0.0) if"),
        ("a given target is normalised unasked", "target is None if norm_pix is None", "True if norm_pix is None")),
    *room("mae_kernels/patch_embed.py", "test_any_input.py -k 'eager or gradcheck'",
        ("a gradient from no token", "torch.where(padding, 0, rows)", "rows")),
    *room("mae_kernels/gather_tokens.py", "test_any_input.py -k eager",
        ("a token for no id", "out.masked_fill_(padding, 0)", "out")),
    *room("mae_kernels/scatter_mask_tokens.py", "test_any_input.py -k eager",
        ("a mask token of no patch", "torch.where(padding.flatten(), len(table), masked)", "masked")),
    *room("mae_kernels/masking.py", "test_masking.py -k 'blocks or axis or tubes or grids or unequal'",
        ("a line too many", "(draw.argsort(dim=1) < hidden)", "(draw.argsort(dim=1) <= hidden)"),
        ("later rectangles first", "torch.arange(_RECTANGLES, 0, -1,", "torch.arange(1, _RECTANGLES + 1,")),
    *room("mae_kernels/kernels/masking.py", "test_masking.py -k 'unequal and triton'",
        ("patches in the place of -1", "is_hidden, -1, patch)", "is_hidden, patch, patch)")),
    *room("mae/model/attention.py", "test_ragged.py -k alone",
        ("attention to padding", "keys = None if keys is None else keys[:, None, None]", "keys = None")),
    *room("mae/model/positions.py", "test_positions.py -k side_by_side",
        ("time that is not resampled", "x = F.interpolate(x, (new_grid[0], x.shape[3])",
         "x = F.interpolate(x, (x.shape[2], x.shape[3])")),
]  # fmt: skip

EAGER_OPS = [
    *room("mae_kernels/masked_mse.py", "test_masked_mse.py -k eager",
        ("eager: eps outside the root", ".add_(eps_of_variance).sqrt_()", ".sqrt_().add_(eps_of_variance)"),
        ("eager: a biased variance", ".div_(x.shape[dim] - 1)", ".div_(x.shape[dim])"),
        ("a mean over the visible patches too", "max(len(flat_ids), 1)", "max(n * rows, 1)"),
        ("a loss in half precision", "accumulation_dtype(pred.dtype), None", "pred.dtype, None")),
    *room("mae_kernels/linear_masked_mse.py", "test_linear_masked_mse.py -k eager",
        ("a smaller last chunk counts as the others", "losses.append(chunk_loss / chunk_scale)",
         "losses.append(chunk_loss * (step * m * values / 2))"),
        ("the head's gradient of the last chunk alone", "total.add_(x, alpha=factor) if total.numel()",
         "x.to(sum_dtype).mul_(factor) if total.numel()")),
    *room("mae_kernels/products.py", "test_products.py",
        ("oneDNN: the gradient of the input without its divisor", "product.div_(divisor)", "product"),
        ("MKL: the gradient of the input without its divisor", "alpha=1 / divisor", "alpha=1"),
        ("oneDNN: a bias read without its strides", "else bias.contiguous()", "else bias"),
        ("oneDNN: a bias forgotten", '_linear_pointwise(x, weight, bias,', '_linear_pointwise(x, weight, None,'),
        ("oneDNN: exports hold an op that others do not know", "torch.compiler._is_exporting_flag or ", "False or "),
        ("oneDNN: counters do not see the product", "torch._C._len_torch_dispatch_stack() or ", ""),
        ("oneDNN: transforms meet a product that has no derivative",
         " or torch._C._are_functorch_transforms_active()", ""),
        ("oneDNN: rows and columns of the weight's gradient exchanged", "_product(grad.t(), x.t(), None)",
         "_product(x.t(), grad.t(), None)"),
        ("oneDNN: taken for small products", "return x.numel() * outputs >= _FEWEST_PRODUCTS", "return True")),
    *room("mae_kernels/patchify.py", "test_patchify.py test_masked_mse.py -k 'not triton'",
        ("channels last of a patch are read as first", '(pt * ph * pw, c) if stored == "channels_last"',
         '(pt * ph * pw, c) if stored == "channels_first"'),
        ("a patch stored column by column", "(c r p q)", "(c r q p)"),
        ("eager: the mean of another channel", "statistics.to(work)", "statistics.to(work).flip(1)"),
        ("eager: uint8 divided by 256", ".div_(255)", ".div_(256)")),
    *room("mae_kernels/patch_embed.py", "test_patch_embed.py -k eager",
        ("a dropped prefix", "out[:, :num_prefix] = prefix", "out[:, :num_prefix] = 0"),
        ("positions in ascending order", "index_select(0, ids_keep.flatten())",
         "index_select(0, ids_keep.sort(1).values.flatten())"),
        ("the gradient of images without std", ".div_(x.statistics[1][:, None])", ""),
        ("the gradient of positions summed in half precision", "g_pos = g_tokens.sum(0, dtype=sum_dtype)",
         "g_pos = g_tokens.sum(0)")),
    *room("mae_kernels/scatter_mask_tokens.py", "test_scatter_mask_tokens.py -k eager",
        ("eager: ids off by one", "ids_restore + (starts + num_prefix)", "ids_restore + starts"),
        ("a token too many is visible", "ids_restore < num_tokens", "ids_restore <= num_tokens"),
        ("the mask token's gradient of other rows", "row_ids(ids_mask, step, num_prefix)", "row_ids(ids_mask, step)")),
    *room("mae_kernels/gather_tokens.py", "test_gather_tokens.py -k eager",
        ("a gradient for tokens that were not chosen", "table[-1] = 0", "table[-1] = 1")),
    *room("mae_kernels/masking.py", "test_masking.py -k 'not triton'",
        ("a mask of one patch too few", "ids_restore >= num_keep", "ids_restore > num_keep"),
        ("the number of visible patches rounded up", "int(num_patches * (1 - mask_ratio)) if",
         "-int(num_patches * (mask_ratio - 1) // 1) if")),
    *room("mae_kernels/random_resized_crop.py", "test_random_resized_crop.py -k eager",
        ("pictures turned upside down", "size[0], None), _filters(boxes[:, 3], size[1], flips)",
         "size[0], flips), _filters(boxes[:, 3], size[1], None)"),
        ("boxes that never reach the far edge", "(place * (room + 1))", "(place * room)")),
    *room("mae_kernels/nn.py", "test_nn.py -k eps",
        ("a module that forgets its eps", "eps=self.eps, ", "")),
    *room("mae_kernels/backend.py", "test_backend.py",
        ("a silent fall-back to PyTorch", 'if _selected == "triton":', "if False:")),
]  # fmt: skip

MODEL = [
    *room("mae/model/vit.py", "test_model.py -k 'published_pass or reconstruction'",
        ("the first block of the encoder skipped", "enumerate(self.blocks):\n            x = of_some",
         "enumerate(self.blocks[1:]):\n            x = of_some"),
        ("no norm behind the encoder", "return self.norm(x)", "return x")),
    *room("mae/model/autoencoder.py", "test_model.py -k 'published_pass or reconstruction'",
        ("the decoder backwards", "enumerate(self.decoder_blocks)", "enumerate(self.decoder_blocks[::-1])"),
        ("no norm before the head", "hidden = self.decoder_norm(hidden)\n", "\n"),
        ("hidden patches one place too early", "ids_mask + (ids_mask >= 0)", "ids_mask"),
        ("pictures that stay normalised", "unpatchify(patches, *sizes) * std + mean", "unpatchify(patches, *sizes)")),
    *room("mae/model/positions.py", "test_positions.py -k column",
        ("rows and columns of positions swapped", "in reversed([*enumerate(grid)])", "in enumerate(grid)")),
    *room("mae_kernels/nn.py", "test_model.py -k published_pass",
        ("the class token without its position", "return prefix + pos_embed[:num_prefix], pos", "return prefix, pos")),
    *room("mae_kernels/registration.py", "test_transforms.py test_model_under_pytorch.py -k compiled_functional",
        ("compiled gradients of torch.func that are left out", "(map(_seen_anew, args) if", "(args if"),
        ("a loss that is told of no gradient", "        x = _seen_anew(x)", "        pass")),
    *room("mae/model/block.py", "test_block.py -k 'value or published'",
        ("no residual around attention", "rows + attended,", "attended,"),
        ("the first norm twice", "attended, self.norm2", "attended, self.norm1"),
        ("the eps of PyTorch's norms", 'eps = float(f"{norm.eps}")', "eps = 1e-5"),
        ("another gelu in the forward", "products.linear(F.gelu(x)", "products.linear(F.relu(x)")),
    *room("mae/model/cross.py", "test_cross_decoder.py -k 'plain or unequal'",
        ("no residual around attention to visible tokens", "(x + attended", "(attended"),
        ("padding that hidden patches attend to", "q.bias), keys)", "q.bias), None)")),
    *room("mae/model/cross.py", "test_cross_decoder.py -k 'subset or likely'",
        ("predicted patches from the top of the image", "order[:, :", "order.sort(1).values[:, :"),
        ("the same predicted patches in every mask", "mixed + mixed.sum(dim=1, keepdim=True)", "mixed")),
    *room("mae/model/autoencoder.py", "test_cross_decoder.py -k 'plain or subset'",
        ("queries without the mask token", "(positions + self.mask_token)", "positions"),
        ("a loss of patches that are not predicted", "mask=scored.mask", "mask=masking.mask")),
    *room("mae/model/attention.py", "test_block.py -k test_attention",
        ("attention without its scale", "scaled_dot_product_attention(q, k, v, keys)",
         "scaled_dot_product_attention(q, k, v, keys, scale=1.0)"),
        ("the backward of attention without its scale", "scale = q.shape[2] ** -0.5", "scale = 1.0"),
        ("keys taken for values", "(queries, *packed.unbind(2))", "(queries, *packed.flip(2).unbind(2))")),
]  # fmt: skip

TRAINING = [
    *room("mae/training/step.py", "test_step.py -k 'micro or clipping or left or draw'",
        ("accumulated losses that are not divided", "return loss / self.micro_batches", "return loss"),
        ("accumulated losses divided twice", "loss / self.micro_batches", "loss / self.micro_batches**2"),
        ("a gradient that is not clipped", "_parameters, most)", "_parameters, torch.inf)"),
        ("gradients that stay for the next step", "self.optimizer.zero_grad()", "pass"),
        ("masks of another ratio", "(batch_size, grid, self.ratio,", "(batch_size, grid, 0.5,"),
        ("a draw before the masks", "if masking is None:", "if masking is None and torch.rand(()) >= 0:")),
    *room("mae/training/step.py", "test_step.py -k strategy",
        ("a strategy that is not asked for", "_STRATEGIES[self.name]", '_STRATEGIES["random"]')),
    *room("mae/training/optimizers.py", "test_step.py -k decay",
        ("weight decay on biases and norms", '"weight_decay": 0.0', '"weight_decay": weight_decay')),
    *room("mae/training/optimizers.py", "test_optimizers.py -k 'groups or pytorchs or finite'",
        ("Muon for embeddings and heads too", "p.ndim == 2 and _BLOCKS", "p.ndim == 2 and name or _BLOCKS"),
        ("Muon's updates at another size than AdamW's", '"match_rms_adamw"', '"original"'),
        ("a momentum that is not finite stays", '(p, self.state[p]["momentum_buffer"])', "(p,)"),
        ("AdamW's update is not left out", "self._adamw.found_inf = self.found_inf", "pass")),
    *room("mae/training/optimizers.py", "test_optimizers.py -k goes_on",
        ("copies of an optimizer that cannot step", "super().__setstate__(state)\n        self._make_parts()",
         "super().__setstate__(state)")),
    *room("mae/training/recipe.py", "test_loop.py -k 'learning_rate or epochs'",
        ("a schedule one step late", "(step + 1) / self.warmup", "step / self.warmup"),
        ("a learning rate for any batch size", "self.base_lr * self.batch_size / 256", "self.base_lr"),
        ("a warmup in steps and not in epochs", "self.warmup_epochs * per_epoch", "self.warmup_epochs")),
    *room("mae/training/step.py", "test_loop.py -k finite",
        ("updates by a loss of NaN", "finite = loss.isfinite()", "finite = torch.ones_like(loss, dtype=torch.bool)")),
    *room("mae/training/step.py", "test_loop.py -k float16",
        ("skips of float16 that nobody counts", "scaler._scale.clone()", "scaler._scale")),
    *room("mae/training/loop.py", "test_loop.py -k 'finite or too_many'",
        ("weights of NaN are saved", "if self.processes.most(not finite):", "if False:"),
        ("losses of NaN for ever", "if len(bad) < self.config.max_skipped:", "if True:")),
    *room("mae/training/loop.py", "test_resume.py -k 'bit_for_bit and test_a_resumed'",
        ("a learning rate from the start", "self.schedule.lr(done)", "self.schedule.lr(done - self.watch.first)"),
        ("batches from the start", "range(first, schedule.steps), rows", "range(schedule.steps - first), rows")),
    *room("mae/training/tasks.py", "test_loop.py -k masks",
        ("masks of another step", '"mask", config.seed, (step, 0)', '"mask", config.seed, (0, 0)')),
    *room("mae/training/state.py", "test_resume.py -k 'bit_for_bit and test_a_resumed or moments'",
        ("moments that are not kept", "if isinstance(x, Tensor)}", "if False}")),
    *room("mae/training/state.py", "test_resume.py -k 'damaged or kept or pickle'",
        ("a shard of another size is read", "if found != size:", "if False:"),
        ("checkpoints that pile up", "steps_on_disk(run)[:-keep]", "[]"),
        ("a damaged checkpoint keeps its place", "if x > step]", "if False]")),
    *room("mae/training/metrics.py", "test_resume.py -k cut_back",
        ("metrics of steps that are done again", 'entry["step"] <= step and', "True or")),
    *room("mae/training/signals.py", "test_stopped.py -k second_signal",
        ("a second signal that nobody obeys", "os._exit(1)", "pass")),
    *room("mae/training/validation.py", "test_recipe.py -k validation_is",
        ("a validation under masks of the batch", "(x[places].to(device)", "(x[: len(places)].to(device)")),
]  # fmt: skip

CLASSES = [
    *room("mae/evaluation/predictions.py", "test_evaluation.py -k 'ranks or nan'",
        ("an equal probability of an earlier class is right too",
         "(probabilities > true) | ((probabilities == true) & (places < labels[:, None]))", "probabilities > true"),
        ("probabilities of NaN are right", ".float().nan_to_num(0.0)", ".float()")),
    *room("mae/evaluation/predictions.py", "test_evaluation.py -k shares",
        ("a process without a batch that stops before the others", "processes.most(batch is not None)",
         "batch is not None")),
    *room("mae/evaluation/probe.py", "test_evaluation.py -k neighbours",
        ("the longest neighbour in place of the nearest", "F.normalize(x.float(), dim=1)", "x.float()"),
        ("neighbours that vote alike, near or far", "/ temperature).exp()", "* 0).exp()")),
    *room("mae/evaluation/attention.py", "test_intermediates.py -k 'softmax or attends'",
        ("maps of attention without its scale", " * keys.shape[3] ** -0.5", ""),
        ("maps of attention that begin with the class token", "shares[:, :, 1:]", "shares[:, :, :-1]")),
    *room("mae/evaluation/features.py", "test_evaluation.py -k head_sees",
        ("features that the norm of the head does not see", 'model.fc_norm(pooled) if kind == "mean"',
         'pooled if kind == "mean"')),
    *room("mae/evaluation/features.py", "test_evaluation.py -k 'reading or class_that'",
        ("labels of pictures that could not be read", "labelled.labels[places]", "labelled.labels[: len(places)]")),
    *room("mae/data/labels.py", "test_labels.py -k 'differ or order'",
        ("classes that are numbered by two orders", "labels=places[tested.labels], ", "")),
    *room("mae/data/hugging_face.py", "test_labels.py -k 'labels'",
        ("a missing label that becomes the last class", "x is None or (is_typed and x == -1)", "x is None")),
    *room("mae/commands/results.py", "test_classify_commands.py -k 'several or finished'",
        ("evaluations that replace each other", "[*(x for x in self._earlier() if x != entry), entry]", "[entry]")),
    *room("mae/commands/labelled_run.py", "test_classify_commands.py -k 'sentence and finetune or begins_with'",
        ("a test set that nobody opens before hours of training", "for labelled in (data, test):",
         "for labelled in (data,):")),
    *room("mae/model/classifier.py", "test_classify_commands.py -k begins_with",
        ("a fine-tuned encoder of random weights", "self.load_state_dict(own | state)", "self.load_state_dict(own)")),
]  # fmt: skip

LABELS = [
    *room("mae/training/augmentation.py", "test_augmentation.py -k cutmix",
        ("a share of cutmix from before its box is cut off", "return Mix(1 - cut / math.prod(size),",
         "return Mix(share,"),
        ("mixup's distribution for cutmix too", "alpha = cutmix if is_cut else mixup", "alpha = mixup or cutmix")),
    *room("mae/training/classification.py", "test_finetune.py -k 'rows or timms'",
        ("labels of other images", "self._labels[batch.numbers]", "self._labels[: len(batch.numbers)]"),
        ("bytes that are mixed as they are", "if mix.share < 1 and mix.box is None:", "if False:"),
        ("boxes of another process's images", "(x[rows] for x in whole)", "(x[: len(images)] for x in whole)"),
        ("each process passes over the same blocks", "draw_keep(config.batch_size, generator)[rows]",
         "draw_keep(len(images), generator)")),
    *room("mae/training/classification.py", "test_probing.py -k 'whole_batch or folding or statistics'",
        ("a batch normalised in each process alone", "    if dist.is_initialized():\n", "    if False:\n"),
        ("a mean that is not folded into the layer", "bias - weight @ mean", "bias"),
        ("statistics of NaN for ever", "torch.where(is_finite, new, running)", "new")),
    *room("mae/training/optimizers.py", "test_finetune.py -k 'groups or finite'",
        ("positions that decay", "p.ndim > 1 and name not in _TOKENS", "p.ndim > 1"),
        ("a momentum that nobody wrote", "torch.zeros_like(p)", "torch.empty_like(p)")),
    *room("mae/training/loop.py", "test_finetune.py -k 'averages or timms'",
        ("averages that nobody saves", "weights = {name: x.clone() for name, x in weights.items()}", "pass"),
        ("one learning rate for all layers", 'lr * group.get("lr_scale", 1.0)', "lr")),
    *room("mae/model/block.py", "test_finetune.py -k half",
        ("drop path of the other half", "[..., None, None].unbind(1)  #", "[..., None, None].unbind(1)[::-1]  #")),
]  # fmt: skip

DATA = [
    *room("mae/data/order.py", "test_data.py -k 'rows or epoch or workers_and'",
        ("an order that is always the same", 'return permutation("order", self.seed, (epoch, 0)',
         'return permutation("order", self.seed, (0, 0)'),
        ("rows of another process", "(step + 1) * self.batch_size)[rows]", "(step + 1) * self.batch_size)")),
    *room("mae/data/order.py", "test_streaming.py",
        ("pictures that are not mixed within their block",
         'permutation_within("within", self.seed, (epoch, 0), piece)', "np.arange(self.count)"),
        ("blocks that are opened together", "np.arange(lanes) * self.count //", "0 * np.arange(lanes) * self.count //"),
        ("blocks in the order of the files", 'laid_out(permutation("order", self.seed, (epoch, 0), len(self._sizes))',
         "laid_out(np.arange(len(self._sizes))")),
    *room("mae/data/streaming.py", "test_streaming.py",
        ("blocks that are opened again in every step", "opened[i] if i in opened else ", ""),
        ("files of a network read ahead", 'cache_type="none"', "block_size=1 << 20"),
        ("a network that is asked for every picture", "raise Unreachable(", "raise DataError(")),
    *room("mae/data/workers.py", "test_data.py -k main_process_that_is_killed",
        ("a worker that outlives its main process", "while os.getppid() == parent:", "while True:")),
    *room("mae/data/crops.py", "test_streaming.py",
        ("a row group read for each broken picture", "[*beside, *spread(", "[*spread(")),
    *room("mae/data/loader.py", "test_streaming.py",
        ("a stream that breaks off in silence", "self.problem = error", "pass")),
    *room("mae/data/randomness.py", "test_data.py -k 'random_numbers'",
        ("draws that do not depend on the place", "_PURPOSES[purpose], *place]", "_PURPOSES[purpose], 0, 0]"),
        ("another stream than that of the first release", "[0, _PURPOSES[purpose],", "[1, _PURPOSES[purpose],")),
    *room("mae/data/crops.py", "test_data.py -k 'hold or boxes'",
        ("crops beside their box", "(left, top, left + width,", "(top, left, left + width,"),
        ("no crop is flipped", "flip < 0.5, problems", "False, problems"),
        ("ratios that are not log-uniform", "3 / 4 * (16 / 9) ** ratio", "3 / 4 + 7 / 12 * ratio"),
        ("height and width of boxes swapped", "round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))",
         "round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))")),
    *room("mae/data/levels.py", "test_readers.py -k 'bits or numbers'",
        ("pixels of 16 bits twice as bright", "return 0, 65535", "return 0, 32767")),
    *room("mae/data/levels.py", "test_readers.py -k 'finite or nodata'",
        ("a value of NaN in the range", "finite = np.isfinite(x)", "finite = np.ones(x.shape, bool)"),
        ("nodata in the range", "return _without_isolated(values)", "return low, high")),
    *room("mae/data/readers/pillow.py", "test_readers.py -k pngs_of",
        ("colours of 16 bits cut to 8", '";16" in _raw_mode(tile)', "False")),
    *room("mae/data/readers/jpeg.py", "test_jpeg.py",
        ("reds and blues exchanged", '"RGB": "RGB"', '"RGB": "BGR"'),
        ("a JPEG that stays on its side", "image.getexif().get(ORIENTATION, 1) == 1", "True")),
    *room("mae/data/pack.py", "test_pack.py",
        ("small images that are enlarged", "if factor < 1:", "if True:")),
    *room("mae/data/hugging_face.py", "test_hugging_face.py",
        ("rows that datasets decodes", "type(feature)(decode=False)", "type(feature)()")),
    *room("mae/data/readers/tiff.py", "test_readers.py -k cut",
        ("channels of a TIFF cut to three", "if alphas > 1 or samples != ", "if False and samples != ")),
    *room("mae/data/sources.py", "test_data.py -k links",
        ("a folder read twice", "in seen:", "in ():")),
    *room("mae/data/readers/pillow.py", "test_data.py -k 'upright or hold'",
        ("a photograph that stays on its side", "ImageOps.exif_transpose(image, in_place=True)", "pass"),
        ("a tensor of transposed pictures", "-1).transpose(2, 0, 1)", "-1).transpose(2, 1, 0)")),
    *room("mae/data/crops.py", "test_clips.py -k 'one_by_one or alike or stretched'",
        ("channels and frames exchanged", ".movedim(-3, -1 - len(image_size))", ""),
        ("every clip begins at the first frame", "int(start * places)", "0"),
        ("sound is cut and flipped as pictures are", "if picture.is_sound:", "if False:")),
    *room("mae/data/readers/reading.py", "test_clips.py -k 'order or taken'",
        ("a stride that is forgotten", "begin + span, stride)", "begin + self.frames)")),
    *room("mae/data/readers/video.py", "test_clips.py -k 'order or taken'",
        ("frames of a video from its beginning", "if frame.pts in chosen:", "if frame.pts in times[: len(chosen)]:")),
    *room("mae/data/readers/sound.py", "test_clips.py -k 'part_of_a_sound'",
        ("sound from its beginning", "read(place * HOP * rate // RATE,", "read(0,")),
    *room("mae/data/readers/arrays.py", "test_readers.py -k arrays_of",
        ("channels that stay last", "np.moveaxis(values, axes[0], 0)", "values")),
    *room("mae/data/sound.py", "test_clips.py -k 'transform or line'",
        ("low frequencies on top", "[::-1]", ""),
        ("twice the power", "2 / window.sum()", "2**1.5 / window.sum()")),
    *room("mae/data/pictures.py", "test_data.py -k 'oddities or central'",
        ("transparency on black", 'image.size, "white"', 'image.size, "black"'),
        ("an oblong size turned over", "(size[1], size[0])", "size")),
]  # fmt: skip

CHECKPOINTS = [
    *room("mae/checkpoints/checkpoint.py", "test_checkpoint.py -k 'round or encoder or mismatch'",
        ("keys and shapes that are not checked", "_check(file, weights, to_layout(expected, weights.layout))", "pass"),
        ("a decoder of random weights", "VisionTransformer(config) if encoder_only else ", ""),
        ("a loaded model in training mode", "return network.eval()", "return network")),
    *room("mae/checkpoints/saving.py", "test_checkpoint.py -k 'failing or leftovers'",
        ("a crash that leaves half a file", "path = stage / name", "path = folder / name"),
        ("a file that another process writes is removed", "_idle(path) > _MINUTE", "True")),
    *room("mae/checkpoints/foreign.py", "test_foreign.py -k found",
        ("averages taken for the weights", "model.averaged != ema", "model.averaged == ema")),
    *room("mae/checkpoints/shapes.py", "test_foreign.py -k settings_decide",
        ("settings in the file that decide nothing", '= settings.get("norm_pix_loss", True)\n', "= True\n")),
    *room("mae/fields.py", "test_checkpoint.py -k before_anything",
        ("a configuration that is built unchecked", "if name in values and not fits(values[name])", "if False")),
    *room("mae/checkpoints/files.py", "test_checkpoint.py -k pickled",
        ("a checkpoint that runs code", "weights_only=True", "weights_only=False")),
    *room("mae/checkpoints/layouts.py", "test_parity.py -k predictions",
        ("queries written where keys belong", '("attention.q_proj", "attention.k_proj",',
         '("attention.k_proj", "attention.q_proj",'),
        ("the three parts of qkv turned around", "x.chunk(len(theirs))", "x.chunk(len(theirs))[::-1]")),
    *room("mae/checkpoints/layouts.py", "test_convert.py -k tensors_keep",
        ("the decoder kept in a file for timm", "in state.items() if not is_decoder(name)}", "in state.items()}"),
        ("parts that share memory", "part.clone() for part", "part for part")),
    *room("mae/checkpoints/configs.py", "test_convert.py -k 'defaults or mask_ratio'",
        ("a default that is not Hugging Face's", '"norm_pix_loss": False', '"norm_pix_loss": True'),
        ("a mask ratio that does not travel", '"mask_ratio": mask_ratio,', '"mask_ratio": 0.75,')),
    *room("mae/checkpoints/convert.py", "test_convert.py -k every_way",
        ("a published file without its model key", '{"model": state} if under_model else state', "state")),
]  # fmt: skip

APPLY = [
    *room("mae_kernels/integrations/apply.py", "test_apply_trial.py -k something_else",
        ("a method that differs is replaced", "difference = _compare(ours, expected)", 'difference = ""'),
        ("a result more or less", "if len(ours.results) != len(expected.results):", "if False:"),
        ("a result of another dtype", "x.shape != y.shape or x.dtype != y.dtype", "x.shape != y.shape"),
        ("other patches pass for the same", "if not torch.equal(x, y):", "if False:"),
        ("buffers that the trial changed", "x.copy_(value)", "pass")),
    *room("mae_kernels/integrations/apply.py", "test_apply.py -k unapply",
        ("a model that stays applied", "if original is not None:", "if False:")),
    *room("mae_kernels/integrations/published.py", "test_apply.py -k test_same_numbers",
        ("published: positions of the class token's row", "self.pos_embed[:, 1:, :]", "self.pos_embed[:, :-1, :]")),
    *room("mae_kernels/integrations/published.py", "test_apply_calls.py -k 'states_its or reaches_it'",
        ("an image size that no image has", "else tuple(stated)", "else stated"),
        ("an argument of a subclass that is dropped", 'given(args, kwargs, "x", "ids_restore")',
         'given(args[:2], {}, "x", "ids_restore")')),
    *room("mae_kernels/integrations/pieces.py", "test_apply.py -k test_same_numbers",
        ("a mask of another dtype", "masking.mask.to(torch.get_default_dtype())", "masking.mask")),
    *room("mae_kernels/untouched.py",
          "test_touched_layers.py -k 'waits or exchanged or side_by_side or subclass or changed_by_hooks'",
        ("a hook that is not called", "if module._forward_hooks or module._forward_pre_hooks or", "if"),
        ("a hook of every module's backward", "    of_all._global_backward_hooks,\n", ""),
        ("a forward of the instance", "if name in module.__dict__:", "if False:"),
        ("the forward of a subclass", "type(module) is cls and", "isinstance(module, cls) and"),
        ("a norm without a weight", '(parameter is not None or name == "weight")', "parameter is not None"),
        ("patches that overlap", "layer.stride == layer.kernel_size", "layer.stride")),
    *room("mae_kernels/integrations/replacement.py", "test_apply_calls.py -k exchanged_since",
        ("a method that was exchanged since", "if _defined(part, name) is not function or", "if False or")),
    *room("mae_kernels/integrations/published.py", "test_apply_calls.py -k no_floating",
        ("bytes taken for pixels", "not embeds(x, embed.proj.weight) or not hides_some", "not hides_some")),
    *room("mae_kernels/integrations/pieces.py", "test_apply_calls.py -k does_not_take",
        ("a mask that is learned", "or mask.requires_grad or", "or"),
        ("a mask of weights", "return bool(is_binary)", "return True")),
    *room("mae_kernels/integrations/timm.py", "test_apply_calls.py -k in_order",
        ("patches out of order", "ids_keep.sort(dim=1).values if drop.ordered else ids_keep", "ids_keep")),
    *room("mae_kernels/integrations/lightly.py", "test_apply.py -k 'same_numbers and lightly'",
        ("lightly: numbers that count the class token", "idx_keep[:, 1:] - 1", "idx_keep[:, 1:]")),
    *room("mae_kernels/integrations/lightly.py", "test_apply_calls.py -k mask_of_lightly",
        ("lightly: an argument that is dropped", "call[1] is not None or", "False or"),
        ("lightly: a mask that is dropped", "or call[3] is not None", "")),
    *room("mae_kernels/integrations/replacement.py", "test_apply_calls.py -k 'nothing_hidden or original_error'",
        ("calls that the ops do not cover", "if result is NotImplemented else", "if result is None else")),
]  # fmt: skip

RUNS = [
    *room("mae/training/run.py", "test_run_folder.py -k 'unasked or one_process'",
        ("a run that is overwritten unasked", "if found and not replaces:", "if False:"),
        ("two processes in one folder", "        lock.acquire()\n", "")),
    *room("mae/training/run.py", "test_resume.py -k overwritten",
        ("a run that is gone before another has begun", "path.rename(place)\n", "pass\n")),
    *room("mae/training/recipe.py", "test_resume.py -k another_recipe",
        ("a run that is resumed with another recipe", "if x != y]", "if False]")),
    *room("mae/training/parallel.py", "test_processes.py -k DDP",
        ("each process takes the same rows", "self.rank * part, (self.rank + 1) * part", "0, part")),
    *room("mae/training/recipe.py", "test_cli.py -k clear_sentence",
        ("options that nobody checks", "check(vars(self), _RULES)", "pass")),
]  # fmt: skip

FAULTS = [
    *KERNELS, *ANY_INPUT, *EAGER_OPS, *MODEL, *TRAINING, *LABELS, *CLASSES, *DATA, *CHECKPOINTS, *APPLY, *RUNS
]  # fmt: skip


def planted(fault: Fault) -> str:
    """The text of the fault's file with the fault in it."""
    text = (ROOT / fault.file).read_text(encoding="utf-8")
    if text.count(fault.right) != 1:
        raise ValueError(f"{fault.name}: {fault.right!r} stands {text.count(fault.right)} times in {fault.file}")
    return text.replace(fault.right, fault.wrong)


def failures(tree: Path, *arguments: str, limit: float | None = None) -> list[str]:
    """Tests of a copy of the code that fail, or what ends them; none where they take longer than limit seconds."""
    command = [sys.executable, "-m", "pytest", "-m", "not slow", "-p", "no:cacheprovider", *arguments]
    # Plugins that no room needs would take a third of the time.
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    options = {"cwd": tree / "tests", "env": environment, "capture_output": True, "text": True}
    try:
        result = subprocess.run(command, **options, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return []
    if result.returncode < 0:
        return [f"the tests end with signal {-result.returncode}"]
    lines = [line for line in result.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    tests = [line.split(" ", 1)[1].split(" - ")[0] for line in lines]
    if result.returncode > 1 or not all("::" in test for test in tests):  # a test that could not even start
        raise RuntimeError(result.stdout + result.stderr)
    return tests


def notice(fault: Fault) -> tuple[str, float]:
    """The first test that notices the fault, empty for none, and seconds."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("examples", "mae", "mae_kernels", "tests"):
            shutil.copytree(ROOT / name, tree / name)
        shutil.copy(ROOT / "pyproject.toml", tree)
        (tree / fault.file).write_text(planted(fault), encoding="utf-8")
        first = [*failures(tree, "-x", *shlex.split(fault.tests), limit=LIMIT), ""][0]
    return first, time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-k", default="", help="only faults whose file or name contains this")
    chosen = [fault for fault in FAULTS if parser.parse_args().k in f"{fault.file}: {fault.name}"]
    tests = []
    with ThreadPoolExecutor(2) as two_at_a_time:
        for fault, (test, seconds) in zip(chosen, two_at_a_time.map(notice, chosen), strict=True):
            tests += [test] if test else []
            word = "noticed" if test else "MISSED "
            print(f"{word} {seconds:3.0f} s  {fault.file}: {fault.name}: {test or 'every test passes'}", flush=True)
    ids = {test for test in tests if "::" in test}
    failing = failures(ROOT, *ids) if ids else []
    for test in failing:
        print(f"FAILS without a fault too: {test}")
    print(f"{len(tests)} of {len(chosen)} faults noticed")
    return int(len(tests) < len(chosen) or bool(failing))


if __name__ == "__main__":
    sys.exit(main())
