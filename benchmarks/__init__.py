# SPDX-License-Identifier: MIT
"""The demo, the benchmarks and what they share with the tests."""
