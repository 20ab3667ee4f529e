"""What nodes say: plain text for artists."""

import re

_WORDS = (
    (r"run `ldmq profile` first or choose --planner uniform", "connect an LDM-Q Profile or choose the planner uniform"),
    (r"`ldmq profile MODEL` makes one", "LDM-Q Profile makes one"),
    (r"`ldmq plan PROFILE\.json` makes one", "LDM-Q Plan makes one"),
    (r"`ldmq quantize` makes one", "LDM-Q Quantize makes one"),
    (r"; see `ldmq info`", ""),
    (r"profile again with --scheme (\S+)", r"choose the planner budget, or the scheme that was profiled"),
    (r"profile again with the same --keep-float", "leave keep_float as it is, or choose the planner budget"),
    (r"--keep-float none", "keep_float none"),
    (r"--(planner|scheme|corrections|dtype) (\w+)", r"the \1 \2"),
    (r"--(planner|scheme|corrections|dtype)", r"\1"),
    (r"keep-float names", "keep_float names"),
    (r"pass --overwrite \(overwrite=True\) to replace", "switch overwrite on to replace it"),
)
"""What the library says about its commands -> the same about nodes."""


def in_node_words(message: str) -> str:
    """A message of diffusers_ldmq whose advice names commands, with advice that names nodes."""
    for pattern, words in _WORDS:
        message = re.sub(pattern, words, message)
    return message
