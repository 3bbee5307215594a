"""What other systems call our parameters: state dicts of one layout to another, nothing is read or written.

Names were read in transformers 4.57.6 and 5.23.0 (``ViTMAEForPreTraining``, ``ViTMAEModel``, and ViT's and BEiT's
``ForImageClassification``) and in timm 1.0.31 (``VisionTransformer``). Ours are those of the published code.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

LAYOUTS = ("published", "huggingface-4", "huggingface-5", "timm")


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message says why and what would help."""


Table = dict[str, tuple[str, ...]]

# Modules and parameters outside the blocks, and within a block. Three names are q, k and v: one matrix in ours.
_ENCODER = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_DECODER = ("decoder_embed", "mask_token", "decoder_pos_embed", "decoder_norm", "decoder_pred")
_HEAD = ("fc_norm", "head")  # of a classifier
_PUBLISHED_BLOCK: Table = {x: (x,) for x in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")}
_BLOCK_4 = {
    "norm1": ("layernorm_before",),
    "attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attn.proj": ("attention.output.dense",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("intermediate.dense",),
    "mlp.fc2": ("output.dense",),
}
_BLOCK_5 = {
    "norm1": ("layernorm_before",),
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.proj": ("attention.o_proj",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}


def is_decoder(name: str) -> bool:
    """Whether a published key belongs to the decoder."""
    return name.startswith("decoder_") or name == "mask_token"


def _table(encoder: dict[str, str], decoder: dict[str, str], blocks: str, decoder_blocks: str, block: Table) -> Table:
    """Ours -> theirs, without ``.weight`` and ``.bias``; # is the number of a block."""
    outside = {ours: (theirs,) for ours, theirs in {**encoder, **decoder}.items()}
    inside = {
        f"{ours}.#.{part}": tuple(f"{theirs}.#.{name}" for name in names)
        for ours, theirs in (("blocks", blocks), ("decoder_blocks", decoder_blocks))
        for part, names in block.items()
    }
    return outside | inside


def _hugging_face(block: Table, blocks: str, decoder_blocks: str = "decoder_layers", vit: str = "vit.") -> Table:
    encoder = {ours: vit + theirs for ours, theirs in _ENCODER.items()}
    decoder = {name: f"decoder.{name}" for name in _DECODER}
    head = {"head": "classifier"} if vit else {}
    return _table(encoder | head, decoder, vit + blocks, f"decoder.{decoder_blocks}", block)


def _beit(block: Table, blocks: str) -> Table:
    """Its norm is behind the mean of the patches."""
    table = _hugging_face(block, blocks, vit="beit.") | {"fc_norm": ("beit.pooler.layernorm",)}
    return {name: theirs for name, theirs in table.items() if name != "norm" and not is_decoder(name)}


# Of a cross decoder, in the place of attn.qkv: no other system has them.
_CROSS = {x: (x,) for x in ("decoder_blocks.#.attn.q", "decoder_blocks.#.attn.kv")}

# All that are recognised; those whose names are no layout of LAYOUTS are read and never written.
_TABLES: dict[str, Table] = {
    "published": _table(
        {x: x for x in (*_ENCODER, *_HEAD)}, {x: x for x in _DECODER}, "blocks", "decoder_blocks", _PUBLISHED_BLOCK
    )
    | _CROSS,
    "huggingface-4": _hugging_face(_BLOCK_4, "encoder.layer"),
    "huggingface-5": _hugging_face(_BLOCK_5, "layers"),
    "huggingface-4, encoder alone": _hugging_face(_BLOCK_4, "encoder.layer", vit=""),
    "huggingface-5, encoder alone": _hugging_face(_BLOCK_5, "layers", vit=""),
    # save_pretrained of transformers 5 turns its names back into those of 4, and decoder_layers into this.
    "huggingface-4, saved by 5": _hugging_face(_BLOCK_4, "encoder.layer", "decoder_encoder.layer"),
    "huggingface-4, BEiT": _beit(_BLOCK_4, "encoder.layer"),
    "huggingface-5, BEiT": _beit(_BLOCK_5, "layers"),
}


def is_head(name: str) -> bool:
    """Whether a published key belongs to a classifier's head."""
    return name.partition(".")[0] in _HEAD


def _is_keys_bias(theirs: str, layout: str) -> bool:
    """Whether it is what BEiT does without, since it changes no result."""
    return layout.endswith("BEiT") and theirs.endswith((".key.bias", ".k_proj.bias"))


# One of these is in every model, and in no block.
_LANDMARKS = ("cls_token", "pos_embed", "patch_embed.proj")


def published_names(keys: Iterable[str], layout: str) -> dict[str, str]:
    """Those keys that are names of the layout, and what we call them; q, k and v have one name."""
    ours = {theirs: name for name, names in _TABLES[layout].items() for theirs in names}
    parts = {key: _split(key) for key in keys}
    return {key: ours[stem].replace("#", number) + leaf for key, (stem, number, leaf) in parts.items() if stem in ours}


def find_models(state: dict[str, Tensor]) -> dict[str, set[str]]:
    """Where models lie in a state dict: what stands before their keys, and the whole keys that a layout knows.

    ``{"model.cls_token": ..., "ema.cls_token": ...}`` holds two, ``"model."`` and ``"ema."``. No key belongs to two
    models; of two readings of the same keys the one that explains more counts, then the one with the shorter prefix.
    """
    names = {re.sub(r"\.(weight|bias)$", "", key) for key in state}
    prefixes = {
        name.removesuffix(landmark)
        for landmark in {table[ours][0] for table in _TABLES.values() for ours in _LANDMARKS}
        for name in names
        if f".{name}".endswith(f".{landmark}")
    }
    found = {}
    for prefix in prefixes:
        inside = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
        known = max((published_names(inside, layout) for layout in _TABLES), key=len)
        found[prefix] = {prefix + key for key in known}
    result: dict[str, set[str]] = {}
    for prefix in sorted(found, key=lambda prefix: (-len(found[prefix]), len(prefix), prefix)):
        if not any(found[prefix] & keys for keys in result.values()):
            result[prefix] = found[prefix]
    order = {key: i for i, key in enumerate(state)}
    return dict(sorted(result.items(), key=lambda item: min(order[key] for key in item[1])))


def find_layout(state: dict[str, Tensor]) -> str:
    """The layout of a state dict, by the keys of its blocks; timm's keys are the published ones.

    Returns:
        ``"published"``, ``"huggingface-4"``, ``"huggingface-5"``, or one of their variants, which :func:`to_layout` and
        :func:`from_layout` take too: the encoder alone (``ViTMAEModel``), as saved by transformers 5, or BEiT's.

    Raises:
        CheckpointError: keys of no layout known here, or of two of them.
    """
    blocks = {stem: key for key in state for stem in (_split(key)[0],) if "#" in stem}
    found = {}
    for layout, table in _TABLES.items():
        known = blocks.keys() & {name for names in table.values() for name in names}
        if known:
            found[layout] = known
    if not found:
        looked_for = ", ".join(f"{table['blocks.#.attn.proj'][0]} ({name})" for name, table in _TABLES.items())
        raise CheckpointError(
            f"the keys are of no layout known here, such as {next(iter(state), 'none at all')}; "
            f"looked for {looked_for.replace('#', '0')}"
        )
    best = max(found, key=lambda layout: len(found[layout]))
    for layout, known in found.items():
        if known - found[best]:
            one, other = (blocks[min(stems)] for stems in (found[best] - known, known - found[best]))
            raise CheckpointError(f"the keys are of two layouts, {one} of {best} and {other} of {layout}")
    return best


def to_layout(state: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Published keys to those of ``layout``; tensors are copied, none shares memory with another.

    ``attn.qkv`` ``[3 D, D]`` becomes three of ``[D, D]`` for Hugging Face. timm gets the encoder alone: its loader
    takes every state dict with a ``mask_token`` for DINOv2's. BEiT gets no bias of the keys, which changes no result.

    Raises:
        ValueError: an unknown layout, or a key that is not published.
    """
    if layout == "timm":
        state, layout = {name: x for name, x in state.items() if not is_decoder(name)}, "published"
    if layout not in _TABLES:
        raise ValueError(f"there is no layout called {layout!r}; choose one of {', '.join(LAYOUTS)}")
    table, result = _TABLES[layout], {}
    for name, x in state.items():
        stem, number, leaf = _split(name)
        if stem not in table:
            raise ValueError(f"{name} is no key of the published layout")
        theirs = [theirs.replace("#", number) + leaf for theirs in table[stem]]
        result.update(zip(theirs, (part.clone() for part in x.chunk(len(theirs))), strict=True))
    return {name: x for name, x in result.items() if not _is_keys_bias(name, layout)}


def from_layout(state: dict[str, Tensor], layout: str | None = None) -> dict[str, Tensor]:
    """Keys of any layout, found by :func:`find_layout` where it is not given, to the published ones.

    The bias of the keys that BEiT has not becomes zeros.

    Raises:
        CheckpointError: an unknown layout, a key that is not part of it, or q, k and v that are not all there.
    """
    layout = "published" if layout == "timm" else layout or find_layout(state)
    table = _TABLES[layout]
    ours = {theirs: (name, part) for name, names in table.items() for part, theirs in enumerate(names)}
    parts: dict[str, dict[int, Tensor]] = {}
    for key, x in state.items():
        stem, number, leaf = _split(key)
        if stem not in ours:
            raise CheckpointError(f"{key} is not part of a masked autoencoder")
        name, part = ours[stem]
        parts.setdefault(name.replace("#", number) + leaf, {})[part] = x
    for name, found in parts.items():
        stem, number, leaf = _split(name)
        for part, theirs in enumerate(x.replace("#", number) + leaf for x in table[stem]):
            if part not in found and _is_keys_bias(theirs, layout):
                found[part] = torch.zeros_like(next(iter(found.values())))
            elif part not in found:
                raise CheckpointError(f"{theirs} is missing")
    return {name: torch.cat([found[i] for i in sorted(found)]) for name, found in parts.items()}


def _split(key: str) -> tuple[str, str, str]:
    """``"blocks.3.norm1.bias"`` -> ``"blocks.#.norm1"``, ``"3"``, ``".bias"``."""
    number = re.search(r"\.(\d+)\.", key)
    leaf = re.search(r"\.(weight|bias)$", key)
    stem = key[: leaf.start()] if leaf else key
    return re.sub(r"\.\d+\.", ".#.", stem, count=1), number[1] if number else "", leaf[0] if leaf else ""
