# SPDX-License-Identifier: MIT
"""The `flashvid` command: what helps to decide about compression and to look at it, beside `vllm serve`.

A command is a module or a folder (``env``, ``viz``, ``tune``, ``play``); what they share lies beside them. They may
import all of the package, and nothing imports them.
"""
