# SPDX-License-Identifier: MIT
"""Linear attention in float32 for vLLM on a CPU, so that Qwen3.5 can be held against transformers exactly.

vLLM's own CPU kernel takes bfloat16 alone, which hides faults below about 1e-2 of a logprob. This stands in
for it with the recurrence written out; everything around it stays vLLM's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor


@contextmanager
def float32_linear_attention() -> Iterator[None]:
    """Engines of dtype float32 that start inside have it, in this process and without torch.compile."""
    from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention

    vllms = QwenGatedDeltaNetAttention.forward_cpu

    def forward(layer: Any, hidden_states: Tensor) -> Tensor:
        return (_forward if hidden_states.dtype == torch.float32 else vllms)(layer, hidden_states)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QwenGatedDeltaNetAttention, "forward_cpu", forward)
        yield


def _forward(layer: Any, hidden_states: Tensor) -> Tensor:
    """As QwenGatedDeltaNetAttention.forward_cpu, for Qwen3.5's layout of the projections."""
    from vllm.forward_context import get_forward_context

    qkvz, _ = layer.in_proj_qkvz(hidden_states)
    ba, _ = layer.in_proj_ba(hidden_states)
    z_size = layer.value_dim // layer.tp_size
    qkv, z = qkvz.split([qkvz.shape[1] - z_size, z_size], dim=1)
    beta, a = ba.chunk(2, dim=1)
    z = z.unflatten(1, (-1, layer.head_v_dim))
    out = torch.zeros_like(z)
    metadata = get_forward_context().attn_metadata
    if metadata is not None:  # else vLLM measures its memory
        own = metadata[layer.prefix]
        for i in range(own.num_decodes + own.num_prefills):
            start, end = own.non_spec_query_start_loc[i : i + 2].tolist()
            slot = int(own.non_spec_state_indices_tensor[i])
            fresh = i >= own.num_decodes and not own.has_initial_state[i]
            out[start:end] = _sequence(layer, qkv[start:end], beta[start:end], a[start:end], slot, fresh)
    return layer._output_projection(out, z)


def _sequence(layer: Any, qkv: Tensor, beta: Tensor, a: Tensor, slot: int, fresh: bool) -> Tensor:
    """One sequence's next tokens: out [n, heads, head_v_dim]; its state in `slot` is read and written."""
    conv_state, state = layer.kv_cache[0][slot], layer.kv_cache[1][slot]
    state = state.view(state.shape[0], layer.head_k_dim, layer.head_v_dim)
    if fresh:
        conv_state.zero_()
        state.zero_()
    # a causal convolution of width 4 on every channel by itself; its state is the 3 inputs before
    seen = torch.cat([conv_state, qkv])
    conv_state.copy_(seen[-len(conv_state) :])
    weight = layer.conv1d.weight.flatten(1)
    qkv = sum(seen[j : j + len(qkv)] * weight[:, j] for j in range(weight.shape[1]))
    key_dim = layer.key_dim // layer.tp_size
    q, k, v = torch.nn.functional.silu(qkv).split([key_dim, key_dim, qkv.shape[1] - 2 * key_dim], dim=1)
    q, k, v = (
        x.unflatten(1, (-1, d)) for x, d in ((q, layer.head_k_dim), (k, layer.head_k_dim), (v, layer.head_v_dim))
    )
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(v.shape[1] // x.shape[1], dim=1) for x in (q * layer.head_k_dim**-0.5, k))
    decay = (-layer.A_log.exp() * torch.nn.functional.softplus(a + layer.dt_bias)).exp()
    return _recurrence(*(x.numpy() for x in (state, q, k, v, decay, beta.sigmoid())))


def _recurrence(state: Any, q: Any, k: Any, v: Any, decay: Any, beta: Any) -> Tensor:
    """The gated delta rule, a token at a time: forget, put right what is stored under k, read under q.

    In numpy, for such small products are not worth waiting for torch's threads.

    Args:
        state: [heads, key, value], changed in place. q, k [n, heads, key], v [n, heads, value].
        decay, beta: [n, heads].
    """
    out = np.empty_like(v)
    for t in range(len(v)):
        state *= decay[t, :, None, None]
        change = (v[t] - (k[t, :, None] @ state)[:, 0]) * beta[t, :, None]
        state += k[t, :, :, None] * change[:, None]
        out[t] = (q[t, :, None] @ state)[:, 0]
    return torch.from_numpy(out)
