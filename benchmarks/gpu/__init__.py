# SPDX-License-Identifier: MIT
"""What a machine with an NVIDIA GPU has to answer, in one command: `make gpu`."""
