# SPDX-License-Identifier: MIT
"""pip's settings (files and PIP_* variables) as the environment variables that mean the same to uv.

uv reads none of pip's settings, so a wheel house or a mirror set up for pip would be missed.
"""

from __future__ import annotations

import ast
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

SECTIONS = ("global", "install", ":env:")  # as in pip, a later one wins


def pip_settings(python: str) -> dict[str, str]:
    """`pip config list` as {name: value}, e.g. {"find-links": "/wheels"}; PIP_* alone where pip is missing."""
    found: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for name, value in os.environ.items():
        if name.startswith("PIP_"):
            found[":env:"][name[4:].lower().replace("_", "-")] = value
    command = [python, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    listing = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in listing.stdout.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.partition(".")
        if section in found and value:
            try:
                found[section][name.lstrip(".")] = str(ast.literal_eval(value))
            except (SyntaxError, ValueError):
                found[section][name.lstrip(".")] = value
    return {name: value for section in SECTIONS for name, value in found[section].items()}


def local_path(location: str) -> Path | None:
    """The directory or file that a find-links or index location names; None for a remote one."""
    if location.startswith("file:"):
        return Path(unquote(urlsplit(location).path))
    return None if "://" in location else Path(location).expanduser()


def usable(locations: str) -> list[str]:
    """The locations in a blank-separated setting, without the local ones that do not exist."""
    found = []
    for location in locations.split():
        path = local_path(location)
        if path is None:
            found.append(location)
        elif path.exists():
            found.append(location if location.startswith("file:") else str(path.resolve()))
    return found


def uv_variables(settings: Mapping[str, str]) -> dict[str, str]:
    """UV_* variables for pip's settings. uv's own variables, where set, are to be kept by the caller."""
    variables = {}
    if index := usable(settings.get("index-url", "")):
        variables["UV_DEFAULT_INDEX"] = index[0]
    if extra := usable(settings.get("extra-index-url", "")):
        variables["UV_INDEX"] = " ".join(extra)
        # pip takes the best version of all indexes, uv that of the first index that has the name
        variables["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    if links := usable(settings.get("find-links", "")):
        variables["UV_FIND_LINKS"] = ",".join(links)
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        variables["UV_NO_INDEX"] = "1"
    if hosts := settings.get("trusted-host", "").split():
        variables["UV_INSECURE_HOST"] = " ".join(hosts)
    for name, variable in (
        ("cert", "SSL_CERT_FILE"),
        ("proxy", "ALL_PROXY"),
        ("constraint", "UV_CONSTRAINT"),
        ("timeout", "UV_HTTP_TIMEOUT"),
        ("default-timeout", "UV_HTTP_TIMEOUT"),
    ):
        if settings.get(name):
            variables[variable] = settings[name]
    return variables
