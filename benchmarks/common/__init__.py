# SPDX-License-Identifier: MIT
"""What the benchmarks share with each other and with the tests: clips, models, servers, records of results."""
