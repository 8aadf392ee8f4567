"""Read the weights of the reference (arc-state's ``.ckpt``) under the names of our modules.

Only tensors are read: the file's pickle may not run code. Tensor names and shapes are those of
arc-state 0.11.1 with its Llama backbone, bidirectional and without positions, as in its presets.
Tested by ``pytest tests/unit/state/test_reference_checkpoint.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Ours by the reference's prefix; what follows is the place of a linear layer in an MLP, which
# depends on dropout, so the layers are counted instead.
_MLPS = {
    "pert_encoder": "pert_encoder",
    "basal_encoder": "cell_encoder",
    "project_out": "head.mlp",
    "final_down_then_up": "head.bottleneck",
}
_RENAMED = {
    "batch_encoder.weight": "batch_encoder.weight",
    "transformer_backbone.norm.weight": "backbone.norm.weight",
    "batch_classifier.0.weight": "tokens.batch_head.weight",
    "batch_classifier.0.bias": "tokens.batch_head.bias",
}
_IN_BLOCK = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attention.out",
    "mlp.down_proj": "ffn.down",
}
_UNUSED = {
    "transformer_backbone.embed_tokens": "a table of word embeddings that cells do not use",
    "confidence_token.confidence_projection": (
        "the reference ends its confidence head in a ReLU, which can die; ours in a softplus"
    ),
}
_BLOCK = re.compile(r"transformer_backbone\.layers\.(\d+)\.(.+)\.weight")
_MLP_LAYER = re.compile(r"(\w+)(?:\.(\d+))?\.(weight|bias)")
_DECODER_LAYER = re.compile(r"gene_decoder\.decoder\.(\d+)\.(weight|bias)")
# In the reference's decoder each hidden layer is linear, LayerNorm, GELU, dropout.
_MODULES_PER_DECODER_LAYER = 4


@dataclass
class Translation:
    """The reference's tensors under our names."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """The reference's name of each tensor without a place in our model -> why."""


def is_reference(tensors: Mapping[str, Tensor]) -> bool:
    """Tell the reference's state dict from ours."""
    return any(name.startswith("transformer_backbone.") for name in tensors)


def translate_reference(tensors: Mapping[str, Tensor]) -> Translation:
    """Give the reference's tensors our names; join those that are one matrix with us.

    Query, key and value become ``attention.qkv`` (and ``attention.value``, for identity
    attention), gate and up ``ffn.gate_up``; tokens become rows of one table.
    """
    result = Translation()
    rest = _translate_blocks(tensors, result)
    rest = _translate_tokens(rest, result)
    decoder_last = max((int(m[1]) for n in rest if (m := _DECODER_LAYER.fullmatch(n))), default=0)
    places = _mlp_places(rest)
    for name, tensor in rest.items():
        reason = next((why for prefix, why in _UNUSED.items() if name.startswith(prefix)), None)
        ours = None if reason else _rename(name, places, decoder_last)
        if ours is None:
            result.skipped[name] = reason or "there is no such part in this model"
        else:
            result.tensors[ours] = tensor
    return result


def _translate_blocks(tensors: Mapping[str, Tensor], result: Translation) -> dict[str, Tensor]:
    blocks: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _BLOCK.fullmatch(name)
        if match is None:
            rest[name] = tensor
        else:
            blocks.setdefault(match[1], {})[match[2]] = tensor
    for number, parts in blocks.items():
        block = f"backbone.blocks.{number}"
        q, k, v = (parts.pop(f"self_attn.{x}_proj", None) for x in "qkv")
        if q is not None and k is not None and v is not None:
            result.tensors[f"{block}.attention.qkv.weight"] = torch.cat([q, k, v])
            result.tensors[f"{block}.attention.value.weight"] = v
        gate, up = (parts.pop(f"mlp.{x}_proj", None) for x in ("gate", "up"))
        if gate is not None and up is not None:
            result.tensors[f"{block}.ffn.gate_up.weight"] = torch.cat([gate, up])
        for name, tensor in parts.items():
            if name in _IN_BLOCK:
                result.tensors[f"{block}.{_IN_BLOCK[name]}.weight"] = tensor
            else:
                rest[f"transformer_backbone.layers.{number}.{name}.weight"] = tensor
    return rest


def _translate_tokens(rest: dict[str, Tensor], result: Translation) -> dict[str, Tensor]:
    names = ("batch_token", "confidence_token.confidence_token")
    rows = [rest[name].reshape(1, -1) for name in names if name in rest]
    if rows:
        result.tensors["tokens.embeddings_TD"] = torch.cat(rows)
    return {name: tensor for name, tensor in rest.items() if name not in names}


def _mlp_places(rest: Mapping[str, Tensor]) -> dict[tuple[str, str], int]:
    """Return the number of each linear layer in its MLP, by (prefix, place in the reference)."""
    found: dict[str, set[str]] = {}
    for name in rest:
        match = _MLP_LAYER.fullmatch(name)
        if match and match[1] in _MLPS:
            found.setdefault(match[1], set()).add(match[2] or "0")
    return {
        (prefix, place): number
        for prefix, places in found.items()
        for number, place in enumerate(sorted(places, key=int))
    }


def _rename(name: str, places: Mapping[tuple[str, str], int], decoder_last: int) -> str | None:
    if name in _RENAMED:
        return _RENAMED[name]
    match = _DECODER_LAYER.fullmatch(name)
    if match is not None:
        layer, part = divmod(int(match[1]), _MODULES_PER_DECODER_LAYER)
        is_last = int(match[1]) == decoder_last
        return f"decoder.{'out' if is_last else f'hidden.{layer}.{part}'}.{match[2]}"
    match = _MLP_LAYER.fullmatch(name)
    if match is None or match[1] not in _MLPS:
        return None
    # The n-th linear layer; ``initialize`` finds its place in our MLP.
    return f"{_MLPS[match[1]]}.#{places[match[1], match[2] or '0']}.{match[3]}"
