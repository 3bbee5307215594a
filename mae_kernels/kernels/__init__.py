"""The Triton implementations of the ops, under the ops' names. Imported when an op first takes one, never before."""

from .gather_tokens import gather_tokens, gather_tokens_backward
from .masked_mse import masked_mse, masked_mse_backward, masked_mse_recomputed_backward
from .masking import masking
from .patch_embed import patch_embed, patch_embed_backward
from .random_resized_crop import random_resized_crop
from .scatter_mask_tokens import scatter_mask_tokens, scatter_mask_tokens_backward
