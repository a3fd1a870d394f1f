# SPDX-License-Identifier: MIT
"""The demo and the benchmarks: a folder for each question, results in results/ and tinyvlm/results/.

demo        what does it look like?                                  make demo
ops         how long does every operation take, how fast could it?   make bench, python -m benchmarks.ops.roofline
serving     how do plain vLLM and the methods do under load?         make serving
frames      what do more frames cost under one budget?               make frames
memory      how much memory does the encoder need?                   python -m benchmarks.memory
soak        does a server stay sound for an hour?                    make soak
fidelity    how much of a real video does every method keep?         make fidelity
gpu         what has a GPU to say to all of this?                    make gpu
tinyvlm     how accurate is every method on a small video LLM?       make tinyvlm
accuracy    how accurate is your model on the paper's benchmarks?    python -m benchmarks.accuracy TASK --model M

load        what serving and frames share: clips, servers, a load and its figures
common      what all share, the tests too: real clips, models made here, servers, records of results
"""
