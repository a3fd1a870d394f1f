# SPDX-License-Identifier: MIT
"""A local page that asks one question twice, plain and compressed: ``flashvid play --base-url URL``.

The way of the data: ``page.*`` in the browser -> ``guard`` (who may ask) -> ``app`` (routes) -> ``clips`` (the video)
-> ``upstream`` (the model's server, timed here) -> the answer, line by line, back to the page. ``kept`` draws tokens
with viz's code. Nothing heavy is imported before it is used.
"""

PACKAGES = {"httpx": "httpx", "starlette": "starlette", "uvicorn": "uvicorn"}  # module -> what to install
