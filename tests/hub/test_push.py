"""Pushing a quantized pipeline to a hub and loading it from there, over HTTP."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffusers_ldmq import QuantizedLDMPipeline

SIDE = {"README.md", "plan.json", "report.json", "profile.json", "sqnr.png", "samples.png"}
Picture = Callable[[Any], torch.Tensor]


def test_a_pushed_pipeline_loads_from_the_hub_with_the_same_pictures(hub, pipe, picture: Picture, fresh_cache) -> None:
    from diffusers_ldmq.sampling import Sampling

    url = pipe.push_to_hub("me/x", sampling=Sampling(steps=2))
    assert url.startswith(f"{hub.url}/me/x/commit/")
    assert hub.repos["me/x"].files().keys() >= SIDE | {"model_index.json", "unet/config.json"}
    expected = picture(pipe)
    fresh_cache()
    assert torch.equal(picture(DiffusionPipeline.from_pretrained("me/x")), expected)
    fresh_cache()
    loaded = QuantizedLDMPipeline.from_pretrained("me/x")
    assert torch.equal(picture(loaded), expected)
    assert (loaded.plan, loaded.report, loaded.profile) == (pipe.plan, pipe.report, pipe.profile)
