"""Which kernel computes softmax(Q K^T) V: what each needs, whether this machine has it, and its call.

A backend that is asked for and missing is an error before training starts, never another kernel in
its place. One exception is shown on the card: kernels without key masks leave captions of
`text.padding=masked` to SDPA.

Dimension key: B batch, L queries, S keys, N heads, K head width.
"""

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from sora_train.config.sections.model import Attention, ModelConfig
from sora_train.errors import ConfigError
from sora_train.models.transformer.attention_gemm import gemm_attention
from sora_train.models.transformer.cpu_kernels import in_use

BACKENDS: tuple[str, ...] = get_args(Attention)
SDPA_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "flash4": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
HALF = (torch.bfloat16, torch.float16)
MASKLESS = ("flash", "flash2", "flash3", "flash4")
"""Kernels that take no key mask on a GPU."""
NEED_GPU = ("cudnn", "varlen", "flash2", "flash3", "flash4")
FLASH_PACKAGES = {
    "flash2": "flash_attn",
    "flash3": "flash_attn_interface",
    "flash4": "flash_attn.cute",
}
"""Backend -> the module of its package: flash-attn, its build for Hopper, and FlashAttention-4, the one in CuTe DSL.
They are looked up without an import and imported at their first use."""
LEAST_CAPABILITY = {"flash2": (8, 0), "flash3": (9, 0), "flash4": (9, 0)}
"""Least compute capability of the GPU; (8, 0) for all others that need one."""
FASTEST = "flash4"
"""What `auto` takes on a GPU that has it; else PyTorch's own choice, which on Hopper is cuDNN's kernel."""
_active: set[str] = set()
"""FASTEST, once it is PyTorch's flash kernel in this process. A graph that is compiled reads it as a constant."""


@cache
def installed_packages() -> tuple[str, ...]:
    """Names of the packages installed here."""
    return tuple(name for name, module in FLASH_PACKAGES.items() if _is_installed(module))


def _is_installed(module: str) -> bool:
    parent, _, child = module.partition(".")
    if importlib.util.find_spec(parent) is None:
        return False
    return not child or importlib.util.find_spec(module) is not None


def resolve(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[str, torch.dtype]:
    """The kernel and the precision it computes in.

    `auto` is FlashAttention-4 where `prepare_attention` found it, for bfloat16 on CPUs what was found to
    be fast there (`cpu_kernels`), else SDPA.
    """
    if backend != "auto":
        return backend, dtype
    if device.type == "cuda" and dtype in HALF and FASTEST in _active:
        return FASTEST, dtype
    if device.type == "cpu" and dtype == torch.bfloat16:
        kernels = in_use()
        return kernels.attention, torch.float32 if kernels.attention_in_float32 else dtype
    return "sdpa", dtype


def prepare_attention(cfg: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Make `model.attention` ready to compute in `dtype` on `device`, before anything is compiled.

    FlashAttention-4 takes the place of PyTorch's flash kernel in this process, under the names of the
    operators that it replaces, so that compilers and checkpoints treat both alike. Deterministic
    algorithms leave `auto` to PyTorch, which then takes FlashAttention-2.

    Raises:
        ConfigError: it cannot.
    """
    reason = missing(cfg.attention, device, dtype, cfg.head_dim)
    wanted = cfg.attention == FASTEST or (
        cfg.attention == "auto" and not torch.are_deterministic_algorithms_enabled()
    )
    if not reason and wanted and not missing(FASTEST, device, dtype, cfg.head_dim):
        try:
            activate_flash_attention_impl("FA4")
            _active.add(FASTEST)
        except Exception as error:
            reason = f"which does not load ({' '.join(str(error).split())[:160]})"
            if cfg.attention == "auto":
                raise ConfigError(
                    f"model.attention=auto takes FlashAttention-4, {reason}; mend or uninstall the package "
                    f"{FLASH_PACKAGES[FASTEST]}, or set model.attention=sdpa"
                ) from error
    if reason:
        usable = [name for name in BACKENDS if not missing(name, device, dtype, cfg.head_dim)]
        raise ConfigError(
            f"model.attention is '{cfg.attention}', {reason}; usable here: {', '.join(usable)}"
        )


def missing(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int = 128
) -> str | None:
    """What `backend` needs and does not have here, or None."""
    if backend not in BACKENDS:
        return "which is not known"
    if backend in FLASH_PACKAGES and backend not in installed_packages():
        installed = ", ".join(installed_packages()) or "none"
        package = FLASH_PACKAGES[backend]
        return f"but the package {package} is not installed (flash-attention packages found: {installed})"
    if backend == "gemm" and device.type != "cpu":
        return f"which is for CPUs and the run is on {device.type}"
    if backend not in NEED_GPU and not (backend == "flash" and device.type == "cuda"):
        return None
    if device.type != "cuda":
        return f"which needs a CUDA device and the run is on {device.type}"
    if dtype not in HALF:
        return f"which computes in bfloat16 and parallel.param_dtype comes to {_name(dtype)}"
    if head_dim % 8 or head_dim > 256:
        return f"which takes head widths that are multiples of 8 up to 256 and model.head_dim is {head_dim}"
    least = LEAST_CAPABILITY.get(backend, (8, 0))
    if torch.cuda.get_device_capability(device) < least:
        name = torch.cuda.get_device_name(device)
        return f"which needs compute capability {least[0]}.{least[1]} and {name} has less"
    return None


def describe(
    cfg: ModelConfig, device: torch.device, dtype: torch.dtype, *, masked_captions: bool
) -> str:
    """What is used, for people: the backend `auto` stands for, the kernel SDPA takes on a GPU, and who
    attends to masked captions."""
    used, dtype = resolve(cfg.attention, device, dtype)
    text = f"{used} (chosen by auto)" if cfg.attention == "auto" else used
    if used == "sdpa" and device.type == "cuda":
        text = f"{sdpa_kernel_on(device, dtype, cfg)} by {text}"
        if torch.are_deterministic_algorithms_enabled():
            text += ", which run.deterministic=true keeps from cuDNN's kernel, about a third faster on Hopper"
    apart = used in MASKLESS and masked_captions and device.type == "cuda"
    return f"{text} in {_name(dtype)}" + (", masked captions by sdpa" if apart else "")


def sdpa_kernel_on(device: torch.device, dtype: torch.dtype, cfg: ModelConfig) -> str:
    """The kernel that PyTorch takes for training on clips without a mask, asked of PyTorch itself."""
    q = torch.empty(
        (1, cfg.num_heads, 256, cfg.head_dim), dtype=dtype, device=device, requires_grad=True
    )
    return SDPBackend(torch._fused_sdp_choice(q, q, q)).name.lower()


def attend(
    backend: str,
    q_BLNK: Tensor,
    k_BSNK: Tensor,
    v_BSNK: Tensor,
    key_mask_BS: Tensor | None,
) -> Tensor:
    """(B, L, N, K) in the dtype of v. Raises ConfigError for a backend this machine lacks."""
    used, dtype = resolve(backend, v_BSNK.device, v_BSNK.dtype)
    if used == "gemm":
        bias = None if key_mask_BS is None else _mask_bias(key_mask_BS, torch.float32)
        q_BNLK, k_BNSK, v_BNSK = (x.transpose(1, 2) for x in (q_BLNK, k_BSNK, v_BSNK))
        return gemm_attention(q_BNLK, k_BNSK, v_BNSK, bias).transpose(1, 2)
    out_dtype = v_BSNK.dtype
    q_BLNK, k_BSNK, v_BSNK = q_BLNK.to(dtype), k_BSNK.to(dtype), v_BSNK.to(dtype)
    if used == "varlen":
        return varlen_attention(q_BLNK, k_BSNK, v_BSNK, key_mask_BS)
    if key_mask_BS is None and used in ("flash2", "flash3"):
        return flash_package_attention(used, q_BLNK, k_BSNK, v_BSNK)
    if key_mask_BS is not None and used in MASKLESS and v_BSNK.is_cuda:
        used = "sdpa"
    return _sdpa(used, q_BLNK, k_BSNK, v_BSNK, key_mask_BS).to(out_dtype)


def _sdpa(
    used: str, q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, key_mask_BS: Tensor | None
) -> Tensor:
    bias = None if key_mask_BS is None else _mask_bias(key_mask_BS, q_BLNK.dtype)
    q_BNLK, k_BNSK, v_BNSK = (x.transpose(1, 2) for x in (q_BLNK, k_BSNK, v_BSNK))
    if used == "sdpa":
        y_BNLK = F.scaled_dot_product_attention(q_BNLK, k_BNSK, v_BNSK, attn_mask=bias)
    else:
        with sdpa_kernel(SDPA_KERNELS[used]):
            y_BNLK = F.scaled_dot_product_attention(q_BNLK, k_BNSK, v_BNSK, attn_mask=bias)
    return y_BNLK.transpose(1, 2)


def varlen_attention(
    q_BLNK: Tensor,
    k_BSNK: Tensor,
    v_BSNK: Tensor,
    key_mask_BS: Tensor | None,
    kernel: Callable[..., Tensor] = varlen_attn,
) -> Tensor:
    """Attention over one row of tokens a clip, the masked keys left out, by a kernel that takes the
    clips' tokens one after another and the places where each begins.

    Real keys move to the front of one buffer and their number is never asked for, so the device is
    not waited for and every shape stays fixed.
    """
    batch, length, _, _ = q_BLNK.shape
    keys = k_BSNK.shape[1]
    starts_q = torch.arange(
        0, (batch + 1) * length, length, dtype=torch.int32, device=q_BLNK.device
    )
    k, v = k_BSNK.flatten(0, 1), v_BSNK.flatten(0, 1)
    if key_mask_BS is None:
        starts_k = torch.arange(0, (batch + 1) * keys, keys, dtype=torch.int32, device=k.device)
    else:
        real = key_mask_BS.flatten()
        order = (~real).to(torch.uint8).argsort(stable=True)
        # What lies behind the last real key is never read; filling it keeps its gradient, which no
        # kernel writes, out of the model.
        unread = ~real[order][:, None, None]
        k, v = k[order].masked_fill(unread, 0), v[order].masked_fill(unread, 0)
        starts_k = F.pad(key_mask_BS.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    y = kernel(q_BLNK.flatten(0, 1), k, v, starts_q, starts_k, length, keys)
    return y.unflatten(0, (batch, length))


def flash_package_attention(name: str, q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(K)) V by package `name`, (B, L, N, K); repeatable under torch's deterministic algorithms."""
    repeatable = torch.are_deterministic_algorithms_enabled()
    if name == "flash2":
        from flash_attn import flash_attn_func
    else:
        from flash_attn_interface import flash_attn_func
    result = flash_attn_func(q_BLNK, k_BSNK, v_BSNK, deterministic=repeatable)
    # Some releases return the log of the softmax's sum beside it.
    y_BLNK: Tensor = result[0] if isinstance(result, tuple) else result
    return y_BLNK


def _mask_bias(key_mask_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where attended, -inf elsewhere: added to the scores, (B, 1, 1, S)."""
    bias_BS = torch.zeros(key_mask_BS.shape, dtype=dtype, device=key_mask_BS.device)
    return bias_BS.masked_fill_(~key_mask_BS, float("-inf"))[:, None, None, :]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
