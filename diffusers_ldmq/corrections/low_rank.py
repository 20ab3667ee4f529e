"""Low-rank branch: a few singular directions of the weight run in floating point beside the integers.

Source: SVDQuant (arXiv 2411.05007), where the branch takes the largest directions and the codes hold the rest; a branch
that takes the largest directions of the rounding error is tried too.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..affine import dequantize_weight
from ..specs import LayerState, geometry_of
from .contract import LayerInputs, least_noise, rebuild

RANK = 16


def low_rank(layer: nn.Module, state: LayerState, inputs: LayerInputs) -> LayerState | None:
    """The state with a branch of rank 16, whichever way has the less output error on the calibrating inputs.

    None for a convolution with groups, and where the branch would hold more than half as many numbers as the weight.
    """
    geometry, weight = geometry_of(layer), layer.weight
    assert isinstance(weight, Tensor)
    rows, columns = geometry.shape[0], geometry.columns
    if geometry.groups > 1 or 2 * RANK * (rows + columns) > rows * columns:
        return None
    plain = replace(state, low_rank_a=None, low_rank_b=None)
    whole = weight.detach().float()
    error = whole - dequantize_weight(plain, weight.shape)
    states = [_with_branch(plain, error, weight.dtype)]
    states.append(rebuild(layer, _with_branch(plain, whole, weight.dtype), inputs))
    return least_noise(layer, states, inputs)


def _with_branch(state: LayerState, target: Tensor, dtype: torch.dtype) -> LayerState:
    """The state with B A = the RANK largest singular directions of `target` [N, ...], rounded as they are stored."""
    matrix = target.flatten(1)
    tall = matrix.shape[0] > matrix.shape[1]
    side = matrix.T if tall else matrix
    # eigenvectors of the smaller Gram matrix: far less work than a full SVD, and no random start
    vectors = torch.linalg.eigh((side @ side.T).double()).eigenvectors[:, -RANK:].float()
    a, b = (vectors.T, matrix @ vectors) if tall else (vectors.T @ matrix, vectors)
    # 16 bits, as a file holds them: what is measured is what is saved
    return replace(state, low_rank_a=a.half().to(dtype).contiguous(), low_rank_b=b.half().to(dtype).contiguous())
