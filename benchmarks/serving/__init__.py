# SPDX-License-Identifier: MIT
"""How plain vLLM and the methods do under load."""
