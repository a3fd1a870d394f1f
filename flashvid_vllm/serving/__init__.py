# SPDX-License-Identifier: MIT
"""What plugs into vLLM's server: its command line and config files, every patch of vLLM (``compat``), metrics, the
scheduler's count of a step's videos, and what a CPU needs. ``compat.install`` is where it begins."""
