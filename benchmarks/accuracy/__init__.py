# SPDX-License-Identifier: MIT
"""Accuracy on video benchmarks through lmms-eval, plain and compressed: `python -m benchmarks.accuracy TASK --model M`.

One `vllm serve --plugin flashvid` answers both; each request says for itself what to keep. lmms-eval lives in an
environment of its own, sends every video as a `video_url`, and a guard aborts the run when a prompt's length shows
that the video was not compressed as asked. What each benchmark needs: docs/accuracy.md.
"""
