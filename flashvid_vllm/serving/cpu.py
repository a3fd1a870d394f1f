# SPDX-License-Identifier: MIT
"""Which dtypes this CPU multiplies matrices in as fast as in float32."""

import os

import torch

# torch.cpu.get_capabilities()'s names of what multiplies in a dtype; x86's, then ARM's
_PRODUCTS = {
    torch.bfloat16: (("avx512_bf16", "amx_bf16"), ("bf16", "sve_bf16")),
    torch.float16: (("avx512_fp16", "amx_fp16"), ("fp16_arith",)),
}
# values of ONEDNN_MAX_CPU_ISA that keep oneDNN, which multiplies on x86, from all of these
_WITHOUT_PRODUCTS = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")


def slow_products(dtype: torch.dtype) -> str | None:
    """Why matrix products in ``dtype`` are slow on this CPU, or None: they are not, or it is of no kind that we know.

    Measured on an AMD EPYC with AVX2 and nothing newer, one core: float32 33 GFLOP/s; bfloat16 5 with the second
    matrix transposed, as in a linear layer, and 1.4 without; float16 6 and 1.1.
    """
    x86, arm = _PRODUCTS.get(dtype, ((), ()))
    found = torch.cpu.get_capabilities()
    wanted = x86 if "avx2" in found else arm if "neon" in found else ()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    limited = wanted is x86 and limit in _WITHOUT_PRODUCTS
    if not wanted or (any(found.get(name) for name in wanted) and not limited):
        return None
    why = f"ONEDNN_MAX_CPU_ISA={limit} keeps it from using them" if limited else f"it has none of {', '.join(wanted)}"
    return (
        f"matrix products in {str(dtype).removeprefix('torch.')} take 6 to 30 times as long as in float32 on this "
        f"CPU ({found.get('cpu_name', found.get('architecture', 'unknown'))}): {why}"
    )
