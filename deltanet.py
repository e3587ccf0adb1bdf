"""The recurrence of Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464): attention whose memory of the
text has one size, however long the text is.

A head keeps a matrix M [K, V]. A token with query q, key k, value v, decay e^g and writing strength b makes

    d = b (v - e^g M^T k),    M <- e^g M + k d^T,    o = M^T q

Several tokens at once, with G_i = g_1 + ... + g_i and L_ij = e^(G_i - G_j) for i >= j, else 0:

    (I + A) D = b (V - e^G K M),    A_ij = b_i (k_i . k_j) L_ij for i > j
    O = e^G Q M + ((Q K^T) L) D,    M <- e^(G_n) M + sum_i e^(G_n - G_i) k_i d_i^T

A token with g = 0 and b = 0 leaves M as it was. M cannot be cut short as a KV cache can, so the last tokens of a pass
stay pending: M takes them up when a later token's position shows that they stay.

Shapes: B batch, S sequence, P pending tokens, Hk and Hv heads of keys (and queries) and of values, each key head for
Hv / Hk of the latter, K and V their dimensions, N channels (queries, keys, values).
"""
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import kernels
from config import ModelArgs

CHUNK = 64                            # tokens at once
MAX_PENDING = 16                      # unless a draft is longer
BUFFERS = ("memory", "length", "inputs", "pending", "keys", "updates", "decays")


class DeltaState(nn.Module):
    """What a Gated DeltaNet remembers of each row's text: all tokens before `length` in `memory`, and after them
    `pending` ones, of which those go that a pass begins before. A pass that begins at position 0 forgets everything."""
    memory: Tensor                    # M, fp32 [B, Hv, K, V]
    length: Tensor                    # int64 [B]
    inputs: Tensor                    # of the convolution: the last before `length`, then the pending, [B, _, N]
    pending: Tensor                   # int64 [B], at most P
    keys: Tensor                      # k of the pending, fp32 [B, P, Hk, K]
    updates: Tensor                   # d, fp32 [B, P, Hv, V]
    decays: Tensor                    # g, fp32 [B, P, Hv]

    def __init__(self, args: ModelArgs, batch: int, max_pending: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        Hk, Hv, K, V = args.delta_key_heads, args.delta_value_heads, args.delta_key_dim, args.delta_value_dim
        shapes = dict(memory=(Hv, K, V), length=(), inputs=(args.conv_size - 1 + max_pending, args.delta_channels),
                      pending=(), keys=(max_pending, Hk, K), updates=(max_pending, Hv, V), decays=(max_pending, Hv))
        dtypes = dict(length=torch.int64, pending=torch.int64, inputs=dtype)
        for name in BUFFERS:
            zeros = torch.zeros(batch, *shapes[name], dtype=dtypes.get(name, torch.float32), device=device)
            self.register_buffer(name, zeros, persistent=False)

    @property
    def max_pending(self) -> int:
        return self.keys.size(1)

    def run(self, qkv: Tensor, g: Tensor, b: Tensor, conv_weight: Tensor, input_pos: Tensor) -> Tensor:
        """o, fp32 [B, S, Hv, V], for the next tokens of each row, which are remembered.

        qkv: before the convolution, [B, S, N]; g, b: fp32 [B, S, Hv]; conv_weight: [N, size]; input_pos: int64 [B, S].
        A row may end in padding: positions that do not follow one another."""
        o = kernels.delta_net(qkv, g, b, conv_weight, input_pos, self.tensors())
        return self.run_reference(qkv, g, b, conv_weight, input_pos) if o is None else o

    def run_reference(self, qkv: Tensor, g: Tensor, b: Tensor, conv_weight: Tensor, input_pos: Tensor) -> Tensor:
        """The same by PyTorch's operators; o of the padding is another."""
        S, P, size = qkv.size(1), self.max_pending, conv_weight.size(1)
        kept = self.take_up(input_pos[:, 0])
        expected = self.length[:, None] + torch.arange(S, device=qkv.device)
        real = (input_pos == expected).cumprod(1).bool()                               # [B, S]
        before = rows_from(self.inputs, kept, size - 1).masked_fill((self.length == 0)[:, None, None], 0)
        inputs = torch.cat((before, qkv), dim=1)
        q, k, v = self.split(convolve(inputs, conv_weight))
        g, b = (t.masked_fill(~real[:, :, None], 0) for t in (g, b))
        done = S - P if S > P else 0                   # all but the last, which stay pending
        parts = []
        if done:
            o, memory = torch.ops.qwen_fast.delta_chunks(*(t[:, :done] for t in (q, k, v, g, b)), self.memory)
            self.memory.copy_(memory)
            parts.append(o)
        q, k, v, g, b = (t[:, done:] for t in (q, k, v, g, b))
        o, updates = attend_and_update(q, k, v, g, b, self.memory)
        for buffer, new in ((self.keys, k), (self.updates, updates), (self.decays, g)):
            buffer[:, :S - done] = new
        taken = real[:, :done].sum(1)
        self.inputs[:, :size - 1 + S - done] = rows_from(inputs, taken, size - 1 + S - done)
        self.length.add_(taken)
        self.pending.copy_(real[:, done:].sum(1))
        return torch.cat((*parts, o), dim=1)

    def take_up(self, begin: Tensor) -> Tensor:
        """Puts into memory those of the pending tokens that are before `begin` [B]: how many, int64 [B]."""
        again = begin == 0
        kept = torch.minimum((begin - self.length).clamp(min=0), self.pending).masked_fill(again, 0)
        gone = torch.arange(self.max_pending, device=begin.device) >= kept[:, None]    # [B, P]
        decays = self.decays.masked_fill(gone[:, :, None], 0)
        keys = self.keys.masked_fill(gone[:, :, None, None], 0)
        memory = take_up(keys, self.updates, decays, self.memory)
        self.memory.copy_(memory.masked_fill(again[:, None, None, None], 0))
        self.length.add_(kept).masked_fill_(again, 0)
        return kept

    def tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in BUFFERS]

    def save(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self.tensors()]

    def restore(self, saved: list[Tensor]) -> None:
        for tensor, old in zip(self.tensors(), saved, strict=True):
            tensor.copy_(old)

    def use(self, tensors: Sequence[Tensor]) -> None:
        """Takes these themselves, of any number of rows."""
        for name, tensor in zip(BUFFERS, tensors, strict=True):
            setattr(self, name, tensor)

    def invalidate(self) -> None:
        """After a pass that was cut short: nothing follows on it, until it begins anew or is restored."""
        self.length.fill_(torch.iinfo(torch.int64).max >> 1)
        self.pending.zero_()

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys of length 1 (and the queries scaled), fp32 [B, S, Hk, K], and values [B, S, Hv, V]."""
        Hk, K = self.keys.shape[2:]
        q, k, v = qkv.split([Hk * K, Hk * K, qkv.size(2) - 2 * Hk * K], dim=2)
        q, k = (t.unflatten(2, (Hk, K)) for t in (q, k))
        q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (q, k))
        return q * K ** -0.5, k, v.unflatten(2, self.updates.shape[2:])


def rows_from(t: Tensor, first: Tensor, n: int) -> Tensor:
    """t[b, first[b] : first[b] + n] of t [B, R, N], for every b."""
    rows = first[:, None] + torch.arange(n, device=t.device)
    return t.gather(1, rows[:, :, None].expand(-1, -1, t.size(2)))


def convolve(inputs: Tensor, weight: Tensor) -> Tensor:
    """Each channel's causal convolution, then SiLU: inputs [B, size - 1 + S, N], weight [N, size] -> fp32 [B, S, N]."""
    size = weight.size(1)
    S = inputs.size(1) - size + 1
    y = sum(inputs[:, i:i + S].float() * weight[:, i].float() for i in range(size))
    return F.silu(cast(Tensor, y))


def per_value_head(t: Tensor, heads: int) -> Tensor:
    """[B, S, Hk, K] -> [B, Hv, S, K]."""
    return t.repeat_interleave(heads // t.size(2), dim=2).transpose(1, 2)


def attend_and_update(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """O and D of some tokens, fp32 [B, S, Hv, V], for memory [B, Hv, K, V]. The others as in DeltaState."""
    Hv = memory.size(1)
    q, k, v, b = per_value_head(q, Hv), per_value_head(k, Hv), v.transpose(1, 2), b.transpose(1, 2)[..., None]
    G = g.cumsum(1).transpose(1, 2)                                                    # [B, Hv, S]
    L = (G[..., :, None] - G[..., None, :]).tril().exp().tril()
    decayed = G.exp()[..., None]
    A = (b * (k @ k.mT) * L).tril(-1)
    D = b * (v - decayed * (k @ memory))
    if D.size(2) > 1:
        D = torch.linalg.solve_triangular(A, D, upper=False, unitriangular=True)       # the diagonal is taken as 1
    o = decayed * (q @ memory) + ((q @ k.mT) * L) @ D
    return o.transpose(1, 2), D.transpose(1, 2)


def take_up(k: Tensor, d: Tensor, g: Tensor, memory: Tensor) -> Tensor:
    """Memory after tokens of these keys, updates and decays, as in DeltaState."""
    G = g.cumsum(1).transpose(1, 2)                                                    # [B, Hv, S]
    k = per_value_head(k, memory.size(1)) * (G[..., -1:] - G).exp()[..., None]
    return G[..., -1, None, None].exp() * memory + k.mT @ d.transpose(1, 2)


@torch.library.custom_op("qwen_fast::delta_chunks", mutates_args=())
def delta_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """O of any number of tokens, and memory, which takes them up chunk by chunk. Opaque to the compiler, which would
    unroll this."""
    parts, memory = [], memory.clone()
    for i in range(0, q.size(1), CHUNK):
        q_i, k_i, v_i, g_i, b_i = (t[:, i:i + CHUNK] for t in (q, k, v, g, b))
        o, d = attend_and_update(q_i, k_i, v_i, g_i, b_i, memory)
        memory = take_up(k_i, d, g_i, memory)
        parts.append(o)
    return torch.cat(parts, dim=1), memory


@delta_chunks.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), torch.empty_like(memory)
