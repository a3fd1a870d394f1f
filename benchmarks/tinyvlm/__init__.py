# SPDX-License-Identifier: MIT
"""A video LLM small enough to train on two cores, for one question: what does compression cost in accuracy?

Real CLIP ViT-B/16 tower, frozen; projector and a small Qwen2 trained from scratch on full tokens only; compressed at
test time only, and served by vLLM with the plugin as any user's LLaVA-OneVision model would be.

    python -m benchmarks.tinyvlm all             all of it, going on where it stopped; trains if there are no weights
    python -m benchmarks.tinyvlm data            what the videos and questions are; --sheet FILE.png draws some
    python -m benchmarks.tinyvlm blind           that the questions cannot be answered without the video
    python -m benchmarks.tinyvlm features        the tower's outputs of all frames, to .cache/tinyvlm
    python -m benchmarks.tinyvlm train           projector and LLM
    python -m benchmarks.tinyvlm build DIR       the model as a directory for transformers and vLLM
    python -m benchmarks.tinyvlm evaluate        every method at every ratio
    python -m benchmarks.tinyvlm variants        changes to FlashVID, on the validation videos
    python -m benchmarks.tinyvlm serve           300 answers from `vllm serve` with the plugin, held against these
    python -m benchmarks.tinyvlm tune            that `flashvid tune` finds the same, on 80 of the videos
    python -m benchmarks.tinyvlm encoder         what a share of the encoder's work costs, on 160 of the videos
    python -m benchmarks.tinyvlm budgets         `adaptive` beside FlashVID and the best peers, and its ablation
    python -m benchmarks.tinyvlm wide            the same on a second model with its own tower, trained if there is none
    python -m benchmarks.tinyvlm tables          every page again from the committed answers, in a minute
    python -m benchmarks.tinyvlm inner           tokens dropped inside the LLM: FlashVID's hybrid and FastV
"""
