"""Attention on integers: softmax(q kᵀ · scale) v with int8 queries, keys and values and 8-bit softmax weights.

Queries and keys have a scale per token, values one per channel of a head, all found in each call. Softmax weights are
unsigned codes 0..255 of their row's largest: a row over thousands of keys, whose weights are all far below 1/255, keeps
them. Values are quantized less their mean over the keys, which softmax weights cannot change and which is added again;
rows are divided by the sum of their weights before rounding. So the small weights that round to zero are missed neither
by what values have in common nor by the scale of the rest.
"""

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .affine import QParams, quantize, symmetric_scale
from .backends.native import native_status
from .specs import QuantSpec

SPEC = QuantSpec(8, "token")
STEPS = 255  # from a softmax weight of zero to a row's largest
OFFSET = 128  # what codes are less when they are kept as int8
SCORES_AT_ONCE = 2**18
"""Scores of a head that are worked on together, so that they stay in a core's cache; at least FEWEST_ROWS rows."""
FEWEST_ROWS = 64


class Codes(NamedTuple):
    """codes: int8 [B, T, d]; scale: fp32, broadcasts against them."""

    codes: Tensor
    scale: Tensor


def integer_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(query keyᵀ · scale + mask) value on integers, in the query's dtype. query: [..., T, d]; key: [..., S, d];
    value: [..., S, e] -> [..., T, e]; mask: broadcasts against [..., T, S], bool (False = not seen) or added; scale:
    None = 1/√d. NaN in a token shows in what it enters.
    """
    base_two = math.log2(math.e) * (query.shape[-1] ** -0.5 if scale is None else scale)
    with torch.autocast(query.device.type, enabled=False):
        centre = value.float().mean(-2, keepdim=True)
        q, k, v = (_codes(x, dim) for x, dim in ((query, -1), (key, -1), (value - centre, -2)))
        q = Codes(q.codes, q.scale * base_two)
        library = native_status().library
        if library is None or mask is not None or query.device.type != "cpu":
            seen = None if mask is None else _added(mask, (*query.shape[:-1], key.shape[-2]))
            out = _in_torch(q, k, v, seen)
        else:
            out = _in_c(q, k, v, library)
    return out.reshape(*query.shape[:-1], value.shape[-1]).add_(centre).to(query.dtype)


def _codes(x: Tensor, dim: int) -> Codes:
    """Symmetric codes of [..., T, d] as [B, T, d], with a scale for each slice along `dim`."""
    x = x.reshape(-1, *x.shape[-2:])
    scale = symmetric_scale(x.abs().amax(dim, keepdim=True), SPEC)
    centre = torch.zeros((), dtype=torch.int32, device=x.device)
    return Codes(quantize(x, QParams(scale, centre), SPEC).contiguous(), scale)


def _added(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A mask as what is added to scores to base 2: fp32 [B, T, S] from `shape` [..., T, S]."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
    return (mask.float() * math.log2(math.e)).expand(shape).reshape(-1, *shape[-2:])


def _in_torch(q: Codes, k: Codes, v: Codes, mask: Tensor | None) -> Tensor:
    """Every device and mask. Products of codes are exact in fp32 up to 1,040 channels."""
    rows = max(1, SCORES_AT_ONCE // k.codes.shape[1])
    keys, values = k.codes.float().mT, v.codes.float()
    out = []
    for start in range(0, q.codes.shape[1], rows):
        block = slice(start, start + rows)
        scores = (q.codes[:, block].float() @ keys).mul_(q.scale[:, block]).mul_(k.scale.mT)
        scores = scores if mask is None else scores.add_(mask[:, block])
        weights = scores.sub_(scores.amax(-1, keepdim=True)).exp2_().mul_(STEPS)
        whole = weights.sum(-1, keepdim=True)
        out.append((weights.round_() @ values).mul_(v.scale / whole))
    return torch.cat(out, dim=1)


def _in_c(q: Codes, k: Codes, v: Codes, library: ctypes.CDLL) -> Tensor:
    """On a CPU: torch's integer products, and between them one pass from scores to codes."""
    (heads, tokens, _), keys = q.codes.shape, k.codes.shape[1]
    rows = min(tokens, max(FEWEST_ROWS, SCORES_AT_ONCE // keys))
    out = torch.empty(heads, tokens, v.codes.shape[2])
    codes, sums = torch.empty(rows, keys, dtype=torch.int8), torch.empty(rows, 1)
    row_scale, column_scale = q.scale.contiguous(), k.scale.contiguous()
    threads = torch.get_num_threads()
    for head in range(heads):
        less = OFFSET * v.codes[head].sum(0, dtype=torch.int32)
        for start in range(0, tokens, rows):
            block = slice(start, start + rows)
            scores = torch._int_mm(q.codes[head, block], k.codes[head].T)
            n = scores.shape[0]
            pointers = (scores, row_scale[head, block], column_scale[head], codes, sums)
            library.ldmq_softmax_codes(*(tensor.data_ptr() for tensor in pointers), n, keys, threads)
            mixed = torch._int_mm(codes[:n], v.codes[head]).add_(less)
            torch.mul(mixed, v.scale[head] / sums[:n], out=out[head, block])
    return out
