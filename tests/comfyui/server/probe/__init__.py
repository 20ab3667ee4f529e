"""A custom node pack for tests only: tells which modules the server has imported."""

import sys

from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS = {}


@PromptServer.instance.routes.get("/probe/modules")
async def modules(request: web.Request) -> web.Response:
    """Names in sys.modules."""
    return web.json_response(sorted(sys.modules))
