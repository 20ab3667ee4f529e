"""After the blocks: all scales, biases and input steps learned together at the denoiser's output, codes as they are.

Blocks are learned one after the other, each for itself; what their errors do to each other is seen at the output only.
Source: end-to-end training of quantization parameters, EfficientQAT (arXiv 2407.11062, section 3.2). Weights keep the
codes that block reconstruction gave them: learning those at the output as well has been measured to do worse.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from .activations import ActivationStore, UnitRows, gather_calls
from .calls import Batch, parts
from .learning import LearningSettings, UnitLearner
from .specs import LayerState
from .units import Unit, row_bytes, watch

BATCH = 16
"""Rows of an iteration: half of what a block gets, for a pass through all of them."""
KEPT = 3
"""Bytes that a pass with gradients keeps for each byte of its layers' inputs and outputs, about."""


def all_together(
    denoiser: nn.Module,
    states: dict[str, LayerState],
    batches: Sequence[Batch],
    learning: LearningSettings,
    store: ActivationStore,
    generator: torch.Generator,
) -> UnitLearner:
    """Learns the scales, biases and input steps of all the states' layers at the denoiser's output; the denoiser is the
    float one. learning: its iterations, and its rates for what is learned here.

    A pass takes as few rows as its activations need to stay within the store's budget, one at least. Raises OutputError
    for a full disk.
    """
    whole = Unit("", tuple(states))
    rows, batch = _rows(denoiser, whole, batches, store), min(BATCH, learning.batch)
    settled = replace(learning, batch=batch, gamma=0.0, block=1.0, drop=0.0, mix=0.0, rounding="settled")
    learner = UnitLearner(denoiser, whole, rows, states, settled, generator)
    row = next(parts(batches[0], 1))
    size = KEPT * row_bytes(denoiser, (whole,), row)[whole.name] // row.output.shape[0]
    learner.rows_at_once = min(max(1, store.budget // max(size, 1)), batch)
    return learner


def _rows(denoiser: nn.Module, whole: Unit, batches: Sequence[Batch], store: ActivationStore) -> UnitRows:
    """The denoiser as one unit: what it is given and gives in the float run, as recorded, and what its layers give in
    the first batch, which says how large that is."""
    seen = watch(denoiser, (whole,), batches[0])[whole.name]
    return gather_calls(batches, next(iter(seen.outputs)), seen.layers, store)
