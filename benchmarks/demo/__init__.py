# SPDX-License-Identifier: MIT
"""What it looks like to serve a video on a quarter and on a tenth of its tokens, and the clip that is drawn for it."""
