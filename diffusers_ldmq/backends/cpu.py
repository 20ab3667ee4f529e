"""What the CPU at hand is good at."""

from functools import lru_cache

import torch

# name in torch.cpu.get_capabilities -> the private probe of older torch versions
_PROBES = {
    "amx_tile": "_is_amx_tile_supported",
    "avx512_bf16": "_is_avx512_bf16_supported",
    "avx512_vnni": "_is_vnni_supported",
}


@lru_cache
def cpu_has(feature: str) -> bool:
    """True if the CPU has 'amx_tile', 'avx512_bf16', 'avx512_vnni' or 'avx_vnni', and torch can tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        return bool(capabilities().get(feature, False))
    probe = getattr(torch.cpu, _PROBES.get(feature, ""), None)
    return bool(probe and probe())


def has_vnni() -> bool:
    """True if u8 x s8 products accumulate in int32; older instructions saturate in int16 on the way."""
    return any(cpu_has(feature) for feature in ("amx_tile", "avx512_vnni", "avx_vnni"))


def cpu_kind() -> str:
    """The CPU in words: 'AMX', 'AVX512-VNNI + AVX512-BF16', 'AVX512-VNNI', 'AVX-VNNI' or 'no VNNI'."""
    if cpu_has("amx_tile"):
        return "AMX"
    if cpu_has("avx512_vnni"):
        return "AVX512-VNNI + AVX512-BF16" if cpu_has("avx512_bf16") else "AVX512-VNNI"
    return "AVX-VNNI" if has_vnni() else "no VNNI"


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """The floating dtype in which quantized layers and the float rest run fastest together on `device`.

    CPU: bf16 where there are bf16 instructions, else fp32 (without them a bf16 GEMM is several times slower
    than fp32). CUDA: bf16 from compute capability 8, fp16 below.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == "cpu" and (cpu_has("amx_tile") or cpu_has("avx512_bf16")):
        return torch.bfloat16
    return torch.float32
