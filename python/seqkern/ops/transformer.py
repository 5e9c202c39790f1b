"""``seqkern::transformer_step``: one new position of each sequence through a layer of a transformer, in one call.

x [B, E]; own [B, 2, H, capacity, D], keys and values, of which the first ``length`` positions are there and the next is
written; own_mask [B, 1, 1, length + 1], bool, True = seen; memory_keys, memory_values [B, H, S, D] of a layer with a
memory; memory_mask, memory_bias [B, 1, 1, S]. weights, each with its bias behind it: the attention's input and output
projection, its norm; the same of the memory's attention; the feed-forward's two layers, their norm. -> [B, E].

Inference alone: there is no gradient. The compiled library adds the implementation on a CPU, for few rows, whose time
goes by the weights that they read.
"""

import torch

_LIBRARY = torch.library.Library("seqkern", "FRAGMENT")
_LIBRARY.define(
    "transformer_step(Tensor x, Tensor(a!) own, SymInt length, Tensor? own_mask, Tensor? memory_keys, "
    "Tensor? memory_values, Tensor? memory_mask, Tensor? memory_bias, Tensor?[] weights, bool norm_first, "
    "int activation, float[] eps) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
op = torch.ops.seqkern.transformer_step.default


@torch.library.register_fake("seqkern::transformer_step", lib=_LIBRARY)
def _fake(x, own, length, own_mask, memory_keys, memory_values, memory_mask, memory_bias, weights, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)
