# SPDX-License-Identifier: MIT
"""What a video is compressed to: needs torch alone, no vLLM, no Triton, no transformers.

``config`` and ``settings`` (what may be asked for), ``budget`` (how many tokens), ``compress`` (which ones: the
algorithm on one page) and its peers in ``methods``. Imports nothing of this package but itself and the ops.
"""
