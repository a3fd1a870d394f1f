# SPDX-License-Identifier: MIT
"""How much of a real video every method keeps."""
