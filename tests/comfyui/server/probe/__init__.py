"""A custom node pack for tests only: tells which modules the server has imported, and makes things go wrong."""

import importlib
import sys
from typing import Any

import comfy.patcher_extension
import torch
from aiohttp import web

ROUTES = importlib.import_module("server").PromptServer.instance.routes


@ROUTES.get("/probe/modules")
async def modules(request: web.Request) -> web.Response:
    """Names in sys.modules."""
    return web.json_response(sorted(sys.modules))


class EmptyLatent:
    """A latent of no pictures."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "make", "probe"

    def make(self) -> Any:
        return ({"samples": torch.zeros(0, 4, 8, 8)},)


class OutOfMemory:
    """A MODEL that runs out of memory when it is sampled."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "make", "probe"

    def make(self, model: Any) -> Any:
        def fail(executor: Any, *args: Any, **options: Any) -> Any:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

        greedy = model.clone()
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        greedy.add_wrapper_with_key(kind, "probe", fail)
        return (greedy,)


NODE_CLASS_MAPPINGS = {"probe_empty_latent": EmptyLatent, "probe_out_of_memory": OutOfMemory}
