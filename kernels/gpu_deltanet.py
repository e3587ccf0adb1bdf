"""Gated DeltaNet on a GPU, for up to 16 tokens of each row: two launches between a layer's linears.

    convolution, SiLU, lengths of q and k, gates | memory, the output's norm and gate

Memory is read once and written once: it takes up the pending tokens that stay, is written, and goes on in registers
over the new tokens, which become pending. The first kernel leaves the numbers of tokens as they are, because all its
blocks read them; the second, which is told by the first, writes them.

The twins: deltanet.DeltaState.run_reference, and model.GatedDeltaNet.heads. Letters as in deltanet.py; M tokens, of
all rows together.
"""
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # pyright: ignore[reportMissingImports]

from . import gpu
from .gpu import MAX_TOKENS, next_power_of_2, normed_dot

MAX_DIM = 128                        # of a head's keys and values: a thread block keeps its memory in registers


@triton.jit
def convolve(qkv_ptr, conv_ptr, length_ptr, inputs_ptr, pending_ptr, keys_ptr, pos_ptr, x_ptr, old_ptr, plan_ptr, b,
             head, q_scale, row, S, P, Hk, Hv, K, V, SIZE: tl.constexpr, BEFORE: tl.constexpr, TOKENS: tl.constexpr,
             WIDTH: tl.constexpr):
    """All tokens of a row, one head of queries, keys or values: to x [M, N], and to `inputs` and `keys`, whose old
    values, as far as they stay, go to old [B, P, Hk, K]. plan [B, 2]: how many stay, -1 for a new text, and how many of
    the S tokens are no padding."""
    is_value, is_key = head >= 2 * Hk, (head >= Hk) & (head < 2 * Hk)
    begin, length = tl.load(pos_ptr + b * S), tl.load(length_ptr + b)
    again = begin == 0
    kept = tl.where(again, 0, tl.minimum(tl.maximum(begin - length, 0), tl.load(pending_ptr + b)))
    length = tl.where(again, 0, length + kept)
    t, d = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    follows = tl.load(pos_ptr + b * S + t, mask=t < S, other=-1) == length + t
    if head == 0:
        tl.store(plan_ptr + 2 * b, tl.where(again, -1, kept))
        tl.store(plan_ptr + 2 * b + 1, tl.min(tl.where(follows, S, t)))

    dims, N = tl.where(is_value, V, K), 2 * Hk * K + Hv * V
    channel = tl.where(is_value, 2 * Hk * K + (head - 2 * Hk) * V, head * K) + d
    here, mask = d < dims, (t < S)[:, None] & (d < dims)[None, :]
    inputs = inputs_ptr + b * (SIZE - 1 + P) * N + channel[None, :]
    qkv = qkv_ptr + b * S * row + channel[None, :]
    x = tl.zeros([TOKENS, WIDTH], tl.float32)
    for i in tl.static_range(SIZE):
        token = (t + i - (SIZE - 1))[:, None]
        old = tl.load(inputs + (kept + i + t)[:, None] * N, mask=mask & (token < 0) & (length > 0), other=0.0)
        new = tl.load(qkv + token * row, mask=mask & (token >= 0), other=0.0)
        weight = tl.load(conv_ptr + channel * SIZE + i, mask=here, other=0.0)
        x += (old.to(tl.float32) + new.to(tl.float32)) * weight.to(tl.float32)[None, :]
    x *= tl.sigmoid(x)
    if not is_value:
        x *= tl.rsqrt(tl.sum(x * x, axis=1) + 1e-6)[:, None]
    if head < Hk:
        x *= q_scale
    tl.store(x_ptr + (b * S + t)[:, None] * N + channel[None, :], x, mask=mask)

    s = tl.arange(0, BEFORE)[:, None]
    before = (s < SIZE - 1) & here[None, :]
    last = tl.load(inputs + (kept + s) * N, mask=before & (length > 0), other=0.0)
    new = tl.load(qkv + t[:, None] * row, mask=mask, other=0.0)
    keys = (b * P * Hk + head - Hk) * K + d
    if is_key:
        for p in range(kept):
            key = tl.load(keys_ptr + keys + p * Hk * K, mask=here, other=0.0)
            tl.store(old_ptr + keys + p * Hk * K, key, mask=here)
    tl.debug_barrier()                                             # all of the old has been read
    tl.store(inputs + s * N, last, mask=before)
    tl.store(inputs + (SIZE - 1 + t)[:, None] * N, new, mask=mask)
    if is_key:
        tl.store(keys_ptr + keys[None, :] + t[:, None] * Hk * K, x, mask=mask)


@triton.jit
def gate(x_ptr, norm_ptr, wba_ptr, A_ptr, dt_ptr, g_ptr, b_ptr, m, row, eps, offset, Hv, C, BLOCK: tl.constexpr):
    """A token's writing strength for one head, of norm(x) and that row of wba, or its decay."""
    y = normed_dot(x_ptr + m * C, norm_ptr, wba_ptr + row * C, eps, offset, C, BLOCK)
    if row < Hv:
        tl.store(b_ptr + m * Hv + row, tl.sigmoid(y))
    else:
        y += tl.load(dt_ptr + row - Hv).to(tl.float32)
        softplus = tl.where(y > 20, y, tl.log(1 + tl.exp(tl.minimum(y, 20.0))))
        tl.store(g_ptr + m * Hv + row - Hv, -tl.exp(tl.load(A_ptr + row - Hv).to(tl.float32)) * softplus)


@triton.jit
def convolve_kernel(qkv_ptr, conv_ptr, length_ptr, inputs_ptr, pending_ptr, keys_ptr, pos_ptr, x_ptr, old_ptr,
                    plan_ptr, hidden_ptr, norm_ptr, wba_ptr, A_ptr, dt_ptr, g_ptr, b_ptr, q_scale, eps, offset, row, S,
                    P, Hk, Hv, K, V, C, SIZE: tl.constexpr, BEFORE: tl.constexpr, TOKENS: tl.constexpr,
                    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One head of a row's q, k or v; or, if there are hidden states, one gate of one token for one head."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    b, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if head < 2 * Hk + Hv:
        convolve(qkv_ptr, conv_ptr, length_ptr, inputs_ptr, pending_ptr, keys_ptr, pos_ptr, x_ptr, old_ptr, plan_ptr, b,
                 head, q_scale, row, S, P, Hk, Hv, K, V, SIZE, BEFORE, TOKENS, WIDTH)
    elif hidden_ptr is not None:
        rest = head - 2 * Hk - Hv
        gate(hidden_ptr, norm_ptr, wba_ptr, A_ptr, dt_ptr, g_ptr, b_ptr, b * S + rest // (2 * Hv), rest % (2 * Hv), eps,
             offset, Hv, C, BLOCK)


@triton.jit
def recall_kernel(memory_ptr, length_ptr, pending_ptr, updates_ptr, decays_ptr, old_ptr, plan_ptr, x_ptr, g_ptr, b_ptr,
                  z_ptr, norm_ptr, y_ptr, eps, row, S, P, Hk, Hv, K, V, KEYS: tl.constexpr, VALUES: tl.constexpr,
                  PLANES: tl.constexpr, PDL: tl.constexpr):
    """One value head of a row: its memory, updates and decays, and the numbers of tokens. y [M, Hv * V]: o, with its
    norm and gate if there are any."""
    if PDL:
        gdc_launch_dependents()
    b, h = (tl.program_id(0) // Hv).to(tl.int64), tl.program_id(0) % Hv
    key_head = h // (Hv // Hk)
    i, j = tl.arange(0, KEYS), tl.arange(0, VALUES)
    at = memory_ptr + (b * Hv + h) * K * V + i[:, None] * V + j[None, :]
    inside = (i < K)[:, None] & (j < V)[None, :]
    memory = tl.load(at, mask=inside, other=0.0)                   # no kernel of this step has written to it
    if PDL:
        gdc_wait()
    kept, real = tl.load(plan_ptr + 2 * b), tl.load(plan_ptr + 2 * b + 1)
    if h == 0:
        length = tl.load(length_ptr + b)
        tl.store(length_ptr + b, tl.where(kept < 0, 0, length + kept))
        tl.store(pending_ptr + b, real)
    memory = tl.where(kept < 0, 0.0, memory)
    for p in range(kept):
        k = tl.load(old_ptr + ((b * P + p) * Hk + key_head) * K + i, mask=i < K, other=0.0)
        d = tl.load(updates_ptr + ((b * P + p) * Hv + h) * V + j, mask=j < V, other=0.0)
        memory = memory * tl.exp(tl.load(decays_ptr + (b * P + p) * Hv + h)) + k[:, None] * d[None, :]
    tl.store(at, memory, mask=inside)
    tl.debug_barrier()                                             # all of the old has been read
    N, q_column, v_column = 2 * Hk * K + Hv * V, key_head * K, 2 * Hk * K + h * V
    for s in range(S):
        m = b * S + s
        q = tl.load(x_ptr + m * N + q_column + i, mask=i < K, other=0.0)
        k = tl.load(x_ptr + m * N + Hk * K + q_column + i, mask=i < K, other=0.0)
        v = tl.load(x_ptr + m * N + v_column + j, mask=j < V, other=0.0)
        g = tl.load(g_ptr + m * Hv + h, mask=s < real, other=0.0)
        strength = tl.load(b_ptr + m * Hv + h, mask=s < real, other=0.0)
        memory *= tl.exp(g)
        d = strength * (v - tl.sum(memory * k[:, None], axis=0))
        memory += k[:, None] * d[None, :]
        o = tl.sum(memory * q[:, None], axis=0)
        tl.store(updates_ptr + ((b * P + s) * Hv + h) * V + j, d, mask=j < V)
        tl.store(decays_ptr + (b * P + s) * Hv + h, g)
        column = h * V + j
        if norm_ptr is not None:
            z = tl.load(z_ptr + m * row + column, mask=j < V, other=0.0).to(tl.float32)
            weight = tl.load(norm_ptr + j, mask=j < V, other=0.0).to(tl.float32)
            o *= tl.rsqrt(tl.sum(o * o) / V + eps) * weight * z * tl.sigmoid(z)
        tl.store(y_ptr + m * Hv * V + column % PLANES * (Hv * V // PLANES) + column // PLANES, o, mask=j < V)


class Gates(NamedTuple):
    """What decays and writing strengths are made from, and the output's norm."""
    hidden: Tensor                   # [M, C]
    hidden_norm: Tensor              # [C]
    wba: Tensor                      # [2 * Hv, C]
    A_log: Tensor                    # [Hv]
    dt_bias: Tensor                  # [Hv]
    norm: Tensor                     # [V]
    eps: float
    offset: float                    # of hidden_norm


def delta_net(qkv: Tensor, conv: Tensor, input_pos: Tensor, state: Sequence[Tensor],
              given: "tuple[Tensor, Tensor] | Gates", planes: int = 1) -> Tensor:
    """The next tokens of each row, as DeltaState.run; the state's tensors change.

    qkv: [M, N and, if it is gated, Hv * V]; input_pos: int64 [B, S]; given: g and b, fp32 [M, Hv], for o fp32
    [M, Hv * V], or what they are made from, for the output as GatedDeltaNet.heads, in the order of planes."""
    memory, length, inputs, pending, keys, updates, decays = state
    (B, Hv, K, V), (P, Hk), (N, size), S = memory.shape, keys.shape[1:3], conv.shape, input_pos.size(1)
    device, fp32 = qkv.device, torch.float32
    x, old = torch.empty(B * S, N, dtype=fp32, device=device), torch.empty_like(keys)
    plan = torch.empty(B, 2, dtype=torch.int32, device=device)
    heads, C, z, norm, eps, offset = 2 * Hk + Hv, 1, None, None, 0.0, 0.0
    made_from: Sequence[Tensor | None] = (None,) * 5
    if isinstance(given, Gates):
        *made_from, norm, eps, offset = given
        g, b = torch.empty(2, B * S, Hv, dtype=fp32, device=device)
        heads, C, z = heads + S * 2 * Hv, given.hidden.size(1), qkv[:, N:]
    else:
        g, b = given
    gpu.launch(convolve_kernel, (B, heads), qkv, conv, length, inputs, pending, keys, input_pos, x, old, plan,
               *made_from, g, b, K ** -0.5, eps, offset, qkv.size(1), S, P, Hk, Hv, K, V, C, SIZE=size,
               BEFORE=next_power_of_2(size - 1), TOKENS=next_power_of_2(S), WIDTH=next_power_of_2(max(K, V)),
               BLOCK=min(2048, next_power_of_2(C)), num_warps=4)
    y = torch.empty(B * S, Hv * V, dtype=fp32 if norm is None else qkv.dtype, device=device)
    gpu.launch(recall_kernel, (B * Hv,), memory, length, pending, updates, decays, old, plan, x, g, b, z, norm, y, eps,
               qkv.size(1), S, P, Hk, Hv, K, V, KEYS=next_power_of_2(K), VALUES=next_power_of_2(V), PLANES=planes,
               num_warps=16)
    return y


def fits(conv: Tensor, state: Sequence[Tensor], dtype: torch.dtype, tokens: int) -> bool:
    """Whether delta_net takes passes of so many tokens a row, for activations of a dtype."""
    memory, _, inputs, _, keys, *_ = state
    small = max(memory.shape[2:]) <= MAX_DIM and tokens <= min(MAX_TOKENS, keys.size(1))
    same = inputs.dtype == dtype and all(t.dtype == torch.float32 for t in (memory, *state[4:]))
    return small and same and all(t.is_contiguous() for t in (conv, *state))
