"""The Transformer: Qwen (v1 to 3.8), Llama (2, 3, 3.1, 3.2, CodeLlama, open_llama) and Mistral, from one configuration.

Shapes: B batch, S sequence, T cache length, H query heads, K KV heads, D head dim, C model dim, F feed-forward dim,
V vocabulary, P positions that logits are wanted for.

`kernels.linear` and `kernels.attend` compute F.linear and scaled_dot_product_attention; for a few tokens on a CPU they
run faster kernels of our own.
"""
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import kernels
from config import ModelArgs, rope_frequencies
from deltanet import MAX_PENDING, DeltaState

LONGEST_PASS = 4096                                    # tokens of a pass, where there is an MTPHead


class Transformer(nn.Module):
    """Built empty, best under torch.device("meta"); weights are loaded by load_state_dict(..., assign=True).

    args describes the whole model; local, the share of it in this process where tp.py splits it over several.
    """
    layers: Any                                        # nn.ModuleList of TransformerBlock
    inv_freq: Tensor                                   # fp32 [1 or B, D / 2], see config.rope_frequencies
    hidden_states: Tensor                              # of the last tokens, after the norm, if there is an MTPHead

    def __init__(self, args: ModelArgs, local: ModelArgs | None = None):
        super().__init__()
        self.args, self.local = args, local or args
        self.ranks: Any = None                         # tp.Ranks of a model that is split over processes
        self.quantize_activations = True               # by formats.set_quantize_activations
        rows = self.local.vocab_size                   # a given _weight spares an initialization that is slow to import
        self.tok_embeddings = nn.Embedding(rows, args.dim, _weight=torch.empty(rows, args.dim))
        windows = args.windows or (0,) * args.n_layer
        self.layers = nn.ModuleList(TransformerBlock(self.local, layer, window) for layer, window in enumerate(windows))
        self.norm = RMSNorm(args.dim, args.norm_eps, args.norm_offset)
        self.mtp = MTPHead(self.local) if args.has_mtp else None
        self.output = None if args.tie_word_embeddings else Linear(args.dim, self.local.vocab_size)
        self.gather = nn.Identity()                    # tensor parallelism: the logits of all ranks
        self.max_batch_size = self.max_seq_length = 0
        self.int8_kv_cache = False                     # whether setup_caches makes KV caches in int8
        self.cache_dtype: torch.dtype | None = None    # of the keys and values that there are
        self.cache_owner: Any = None                   # whose text the KV cache holds

    @property
    def device(self) -> torch.device:
        return self.tok_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of the keys and values that setup_caches makes room for."""
        return torch.int8 if self.int8_kv_cache else self.dtype

    def setup_caches(self, batch: int, max_seq_length: int, max_pending: int = 0) -> None:
        """Allocates every layer's KV cache for positions 0 .. max_seq_length - 1, or its DeltaState, unless they are
        large enough. max_pending: how many tokens can be taken back at least, see deltanet.py."""
        pending = max(max_pending, MAX_PENDING)
        if (batch == self.max_batch_size and max_seq_length <= self.max_seq_length and self.kv_dtype == self.cache_dtype
                and all(state.max_pending >= pending for state in self.delta_states())):
            return
        self.max_batch_size = self.max_seq_length = 0  # in case that there is no memory
        for layer in self.layers:                      # the old caches go before the new ones come
            layer.attention.forget()
        self.use_caches([self.new_cache(batch, max_seq_length) for _ in self.full_layers()])
        for layer in self.layers:
            if isinstance(layer.attention, GatedDeltaNet):
                layer.attention.state = DeltaState(self.local, batch, pending, self.dtype, self.device)
        if self.mtp is not None:
            self.mtp.layer.attention.kv_cache = KVCache(*self.new_cache(batch, max_seq_length))
            tokens = min(max_seq_length, LONGEST_PASS)
            hidden = torch.zeros(batch, tokens, self.args.dim, dtype=self.dtype, device=self.device)
            self.register_buffer("hidden_states", hidden, persistent=False)
        self.register_buffer("inv_freq", rope_frequencies(self.args)[None].to(self.device), persistent=False)

    def new_cache(self, batch: int, max_seq_length: int, zeros: Any = kernels.huge_zeros) -> list[Tensor]:
        """The tensors of one layer's KVCache."""
        shape = (batch, self.local.n_local_heads, max_seq_length)
        keys = (*shape, self.args.head_dim), self.kv_dtype
        scales = [((*shape, 1), torch.float32)] * 2 * self.int8_kv_cache
        return [zeros(size, dtype=dtype, device=self.device) for size, dtype in [keys, keys, *scales]]

    def use_caches(self, caches: Sequence[Sequence[Tensor]]) -> None:
        """Takes these tensors, as new_cache makes them, for the KV cache of each layer that has one."""
        for layer, tensors in zip(self.full_layers(), caches, strict=True):
            if layer.attention.kv_cache is None:
                layer.attention.kv_cache = KVCache(*tensors)
            else:                                      # the same module for a compiler, which has seen it
                layer.attention.kv_cache.use(*tensors)
        (self.max_batch_size, _, self.max_seq_length, _), self.cache_owner = tensors[0].shape, None
        self.cache_dtype = tensors[0].dtype

    def use_states(self, states: Sequence[Sequence[Tensor]]) -> None:
        """Takes these for what the DeltaNets remember, as `save` returns it, of any number of rows."""
        for state, tensors in zip(self.delta_states(), states, strict=True):
            state.use(tensors)

    def full_layers(self) -> list["TransformerBlock"]:
        return [layer for layer in self.layers if isinstance(layer.attention, Attention)]

    def delta_states(self) -> list[DeltaState]:
        states = (getattr(layer.attention, "state", None) for layer in self.layers)
        return [state for state in states if state is not None]

    def resumable(self) -> tuple[int, int]:
        """The positions, first and last, that the next token of the only row may have: what comes after is taken back.
        All where there is nothing but a KV cache."""
        states = self.delta_states()
        return (max((int(state.length[0]) for state in states), default=0),
                min((int(state.length[0] + state.pending[0]) for state in states), default=self.max_seq_length))

    def save(self) -> list[list[Tensor]]:
        """Copies of what the DeltaNets remember, for `restore`; the KV cache needs none."""
        return [state.save() for state in self.delta_states()]

    def restore(self, saved: list[list[Tensor]]) -> None:
        for state, tensors in zip(self.delta_states(), saved, strict=True):
            state.restore(tensors)

    def set_prompt_lengths(self, lengths: Sequence[int]) -> None:
        """The length of each row's prompt, before anything of it is computed: Qwen v1's dynamic NTK depends on it."""
        if self.args.dynamic_ntk:
            frequencies = torch.stack([rope_frequencies(self.args, length) for length in lengths])
            if self.inv_freq.shape == frequencies.shape:       # in place: a CUDA graph has recorded the address
                self.inv_freq.copy_(frequencies)
            else:
                self.inv_freq = frequencies.to(self.device)

    def fuse(self) -> kernels.FusedLayers | None:
        """All layers as one operator, for `fused` of forward. None where it cannot stand in for the modules.

        It holds the tensors that the layers have now, so make it anew after any change to a weight, module or cache."""
        return self.fuse_blocks(list(self.layers))

    def fuse_mtp(self) -> kernels.FusedLayers | None:
        """The same, of the head for multi-token prediction."""
        return self.fuse_blocks([self.mtp.layer]) if self.mtp is not None else None

    def fuse_blocks(self, blocks: Sequence["TransformerBlock"]) -> kernels.FusedLayers | None:
        layers = [args for block in blocks if (args := block.kernel_args()) is not None]
        if not layers or len(layers) < len(blocks):
            return None
        return kernels.fuse(layers, self.local.n_head, self.args.norm_eps, self.args.norm_offset,
                            self.quantize_activations)

    def around_layers(self) -> list[Tensor]:
        """All tensors that forward takes from elsewhere than the layers."""
        modules = [module for module in (self.tok_embeddings, self.norm, self.output) if module is not None]
        return present(self.inv_freq, *(t for module in modules
                                        for t in (*module._parameters.values(), *module._buffers.values())))

    def linears(self) -> list[list[Tensor]]:
        """What the linears are computed from where they run by themselves, the head's last. Without experts, which do
        not."""
        modules: list[Any] = [m for m in self.modules() if hasattr(m, "expert_args") and m.experts == 1]
        tied = [[self.tok_embeddings.weight]] if self.output is None else []
        return [module.expert_args(self.dtype) for module in modules] + tied

    def is_unmodified_around_layers(self) -> bool:
        """Whether the modules elsewhere than the layers compute what their classes say."""
        modules = self, self.tok_embeddings, self.norm, self.output, self.gather
        return all(is_unmodified(module, type(module)) for module in modules if module is not None)

    def forward(self, idx: Tensor, input_pos: Tensor, logits_at: Tensor | None = None,
                fused: kernels.FusedLayers | None = None) -> Tensor:
        """Logits [B, P, V] for tokens idx [B, S] at positions input_pos ([S], or [B, S] where rows differ).

        logits_at: int64 [P] or [B, P], which of the S tokens to compute logits for; the last one if None.
        fused: what `fuse` returned, to run instead of the loop over the layers.
        The keys and values of these tokens go to the cache; a token sees all cached positions up to its own.
        """
        input_pos = input_pos.expand(idx.shape)
        cos, sin = self.rope(input_pos)
        logn = self.logn_scale(input_pos) if self.args.logn else None
        x = self.tok_embeddings(idx)                   # [B, S, C]
        if x.dtype == torch.float16:                   # whose range the sums over the layers may leave
            x = x.float()
        if fused is not None and kernels.accepts(fused, x):
            x = kernels.run_fused(fused, x, cos, sin, logn, input_pos)
        else:
            for layer in self.layers:
                x = layer(x, cos, sin, logn, input_pos)
        if self.mtp is not None:
            self.hidden_states[:, :x.size(1)] = self.norm(x)
        if logits_at is None:
            x = x[:, -1:]
        elif logits_at.dim() == 1:
            x = x[:, logits_at]
        else:
            x = x.gather(1, logits_at[:, :, None].expand(-1, -1, x.size(-1)))
        x = self.norm(x)                               # [B, P, C]
        return self.gather(self.head(x))

    def head(self, x: Tensor, rows: int | None = None) -> Tensor:
        """Logits [B, P, V] of hidden states x [B, P, C], or of the first `rows` tokens alone."""
        if self.output is None:
            return kernels.linear(x, self.tok_embeddings.weight[:rows])
        return self.output(x) if rows is None else self.output.first_rows(x, rows)

    def draft(self, idx: Tensor, hidden: Tensor, input_pos: Tensor, fused: kernels.FusedLayers | None = None) -> Tensor:
        """What the head for multi-token prediction expects the hidden states of tokens idx [B, S] to be, [B, S, C],
        given those of the tokens before them, hidden [B, S, C] at input_pos [B, S]."""
        assert self.mtp is not None
        x, (cos, sin) = self.mtp.combine(self.tok_embeddings(idx), hidden), self.rope(input_pos)
        if fused is not None and kernels.accepts(fused, x):
            return self.mtp.norm(kernels.run_fused(fused, x, cos, sin, None, input_pos))
        return self.mtp.norm(self.mtp.layer(x, cos, sin, None, input_pos))

    def rope(self, input_pos: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, fp32 [B, S, 1, R], for the R dimensions of a head that are rotated: rounded from fp64, so that
        the compiler's and PyTorch's are the same."""
        angles = (input_pos[:, :, None, None] * self.inv_freq[:, None, None]).double()
        scale = self.args.rope.attention_factor if self.args.rope else 1.0
        cos, sin = (angles.cos() * scale).float(), (angles.sin() * scale).float()
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)

    def logn_scale(self, input_pos: Tensor) -> Tensor:
        """Qwen v1: queries past the training length are scaled by log_seq_length(position + 1). fp32 [B, S, 1, 1]."""
        return ((input_pos + 1).float().log() / math.log(self.args.seq_length)).clamp(min=1.0)[:, :, None, None]


class TransformerBlock(nn.Module):
    attention: Any                                     # Attention or GatedDeltaNet
    feed_forward: Any                                  # FeedForward or MoE

    def __init__(self, args: ModelArgs, layer: int, window: int):
        super().__init__()
        self.attention = GatedDeltaNet(args) if layer in args.delta_layers else Attention(args, window)
        self.feed_forward = (MoE(args) if args.has_experts(layer) else
                             FeedForward(args.dim, args.intermediate_size, args.mlp_bias))
        self.attention_norm = RMSNorm(args.dim, args.norm_eps, args.norm_offset)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps, args.norm_offset)

    # The compiler works on one block and reuses the result for every layer.
    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, logn: Tensor | None, input_pos: Tensor) -> Tensor:
        h = x + self.attention(self.attention_norm(x), cos, sin, logn, input_pos)
        return h + self.feed_forward(self.ffn_norm(h))

    def kernel_args(self) -> kernels.LayerTensors | None:
        """The tensors that the fused layers compute this block from; None if it was modified, which they would miss."""
        dtype, norms = self.ffn_norm.weight.dtype, (self.attention_norm, self.ffn_norm)
        attention, feed_forward = (part.kernel_args(dtype) if hasattr(part, "kernel_args") else None
                                   for part in (self.attention, self.feed_forward))
        if not (attention and feed_forward and is_unmodified(self, TransformerBlock)
                and all(is_unmodified(norm, RMSNorm) for norm in norms)):
            return None
        return kernels.LayerTensors(self.attention_norm.weight, attention, self.ffn_norm.weight, feed_forward)


class MTPHead(nn.Module):
    """Multi-token prediction (DeepSeek-AI 2024, arXiv 2412.19437, section 2.2): one block guesses the model's hidden
    state of a token from that token and the hidden state before. So it drafts tokens: the embedding and the output head
    are the model's."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        norm_args = args.dim, args.norm_eps, args.norm_offset
        self.embedding_norm, self.hidden_norm, self.norm = (RMSNorm(*norm_args) for _ in range(3))
        self.fc = Linear(2 * args.dim, args.dim)
        self.layer = TransformerBlock(args, -1, 0)     # -1: none of the model's own, so it has attention

    def combine(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        return self.fc(torch.cat((self.embedding_norm(embedded), self.hidden_norm(hidden)), dim=-1))


class Attention(nn.Module):
    def __init__(self, args: ModelArgs, window: int):
        super().__init__()
        self.n_head, self.n_local_heads, self.head_dim = args.n_head, args.n_local_heads, args.head_dim
        self.window = window                           # how many positions a token looks back, 0 for all
        self.output_gate = args.output_gate
        heads = args.n_head * (1 + self.output_gate) + 2 * args.n_local_heads
        self.wqkv = Linear(args.dim, heads * args.head_dim, args.qkv_bias)       # queries, keys, values, gates if any
        self.wo = Linear(args.n_head * args.head_dim, args.dim, args.o_bias)
        norm_args = args.head_dim, args.norm_eps, args.norm_offset
        self.q_norm = RMSNorm(*norm_args) if args.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(*norm_args) if args.qk_norm else nn.Identity()
        self.kv_cache: Any = None                      # KVCache, by Transformer.setup_caches
        self.reduce = nn.Identity()                    # tensor parallelism: the sum over ranks

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, logn: Tensor | None, input_pos: Tensor) -> Tensor:
        return self.reduce(self.wo(self.heads(x, cos, sin, logn, input_pos)))                        # [B, S, C]

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor, logn: Tensor | None, input_pos: Tensor) -> Tensor:
        """What all query heads attend to, [B, S, H * D]: the input of wo. Writes x's keys and values to the cache."""
        B, S, _ = x.shape
        heads = [self.n_head, self.n_local_heads, self.n_local_heads, self.n_head * self.output_gate]
        q, k, v, gate = self.wqkv(x).view(B, S, -1, self.head_dim).split(heads, dim=2)               # [B, S, H or K, D]
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        if logn is not None:
            q = (q.float() * logn).type_as(q)
        self.kv_cache.update(input_pos, k, v)
        y = kernels.attend(q, self.kv_cache.k_cache, self.kv_cache.v_cache, input_pos, self.window,
                           self.kv_cache.scales())
        return y * gate.flatten(2).sigmoid() if self.output_gate else y

    def kernel_args(self, dtype: torch.dtype) -> kernels.AttentionTensors | None:
        """As in TransformerBlock."""
        wqkv, wo = linear_args(dtype, self.wqkv, self.wo)
        kind, norms = type(self.q_norm), (self.q_norm, self.k_norm)
        if not (wqkv and wo and kind in (RMSNorm, nn.Identity) and is_unmodified(self, Attention)
                and is_unmodified(self.reduce, nn.Identity) and all(is_unmodified(norm, kind) for norm in norms)):
            return None
        q_norm, k_norm = (getattr(norm, "weight", None) for norm in norms)
        return kernels.AttentionTensors(wqkv, q_norm, k_norm, wo, self.kv_cache.k_cache, self.kv_cache.v_cache,
                                        self.window, self.output_gate, self.kv_cache.scales())

    def caches(self) -> list[Tensor]:
        return list(self.kv_cache.buffers()) if self.kv_cache else []

    def forget(self) -> None:
        self.kv_cache = None


class GatedDeltaNet(nn.Module):
    """Linear attention, see deltanet.py: in the place of Attention in most layers of hybrids. The positions are in the
    decay, so there is no RoPE."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_head, self.head_dim, self.channels = args.delta_value_heads, args.delta_value_dim, args.delta_channels
        values = self.n_head * self.head_dim
        self.wqkv = Linear(args.dim, self.channels + values)         # queries, keys, values; the output's gate
        self.wba = Linear(args.dim, 2 * self.n_head)                 # writing strength, decay
        self.wo = Linear(values, args.dim)
        self.conv = nn.Parameter(torch.empty(self.channels, args.conv_size), requires_grad=False)
        self.A_log = nn.Parameter(torch.empty(self.n_head), requires_grad=False)
        self.dt_bias = nn.Parameter(torch.empty(self.n_head), requires_grad=False)
        self.norm = RMSNorm(self.head_dim, args.norm_eps)            # fp32, as A_log and dt_bias are
        self.state: Any = None                         # DeltaState, by Transformer.setup_caches
        self.reduce = nn.Identity()                    # as in Attention

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, logn: Tensor | None, input_pos: Tensor) -> Tensor:
        return self.reduce(self.wo(self.heads(x, cos, sin, logn, input_pos)))                        # [B, S, C]

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor, logn: Tensor | None, input_pos: Tensor) -> Tensor:
        """What all value heads read from memory, [B, S, H * D]: the input of wo. x is remembered."""
        qkv, z = self.wqkv(x).split([self.channels, self.n_head * self.head_dim], dim=-1)
        b, a = self.wba(x).float().chunk(2, dim=-1)
        g = -self.A_log.float().exp() * F.softplus(a + self.dt_bias.float())
        y = self.state.run(qkv, g, b.sigmoid(), self.conv, input_pos)                                # [B, S, H, D]
        y = self.norm(y).float() * F.silu(z.float().view_as(y))
        return y.to(x.dtype).flatten(2)

    def kernel_args(self, dtype: torch.dtype) -> kernels.DeltaNetTensors | None:
        """As in TransformerBlock."""
        wqkv, wba, wo = linear_args(dtype, self.wqkv, self.wba, self.wo)
        expected = (self, GatedDeltaNet), (self.norm, RMSNorm), (self.reduce, nn.Identity), (self.state, DeltaState)
        if not (wqkv and wba and wo and all(is_unmodified(module, kind) for module, kind in expected)):
            return None
        return kernels.DeltaNetTensors(wqkv, wba, self.conv, self.A_log, self.dt_bias, self.norm.weight, wo,
                                       self.state.tensors())

    def caches(self) -> list[Tensor]:
        return list(self.state.buffers()) if self.state else []

    def forget(self) -> None:
        self.state = None


class FeedForward(nn.Module):
    def __init__(self, dim: int, size: int, bias: bool = False):
        super().__init__()
        self.size = size
        self.w13 = Linear(dim, 2 * size, bias)         # gate, then up
        self.w2 = Linear(size, dim, bias)
        self.reduce = nn.Identity()                    # as in Attention

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(self.w2(self.hidden(x)))                                                  # [B, S, C]

    def hidden(self, x: Tensor) -> Tensor:
        """The input of w2, [B, S, F]."""
        gate, up = self.w13(x).chunk(2, dim=-1)
        return F.silu(gate) * up

    def kernel_args(self, dtype: torch.dtype) -> kernels.FeedForwardTensors | None:
        """As in TransformerBlock."""
        w13, w2 = linear_args(dtype, self.w13, self.w2)
        if not (w13 and w2 and is_unmodified(self, FeedForward) and is_unmodified(self.reduce, nn.Identity)):
            return None
        return kernels.FeedForwardTensors(w13, w2, self.size)


class MoE(nn.Module):
    """A mixture of experts: a router chooses a few feed-forwards for each token, and weighs what they make of it. Some
    families have a shared one too, which all tokens pass, times a gate. w13 and w2 hold all experts, one after another,
    as their rows: so they are quantized, stored and split like any linear."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_expert, self.n_chosen, self.size = args.n_expert, args.n_expert_per_token, args.expert_size
        self.normalize = args.normalize_experts
        self.router = Linear(args.dim, self.n_expert)
        self.w13 = Linear(args.dim, self.n_expert * 2 * self.size, experts=self.n_expert)       # gate, up; gate ...
        self.w2 = Linear(self.size, self.n_expert * args.dim, experts=self.n_expert)
        self.shared = FeedForward(args.dim, args.shared_expert_size) if args.shared_expert_size else None
        self.shared_gate = Linear(args.dim, 1) if args.shared_expert_size else None
        self.reduce = nn.Identity()                    # as in Attention

    def forward(self, x: Tensor) -> Tensor:
        if not is_unmodified(self.w13, type(self.w13)) or not is_unmodified(self.w2, type(self.w2)):
            raise RuntimeError("hooks of the experts' linears never run: experts run together, hook their MoE")
        flat = x.flatten(0, 1)                         # [M, C]
        chosen, weights = self.route(flat)
        w13, w2 = (linear.expert_args(x.dtype) for linear in (self.w13, self.w2))
        y = kernels.experts(flat, chosen, weights, w13, w2, self.n_expert, self.size, self.w13.quantize_activations)
        if self.shared is not None and self.shared_gate is not None:
            y = y + self.shared_gate(flat).sigmoid() * self.shared(flat)
        return self.reduce(y.view_as(x))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which experts are chosen for x [M, C], int64 [M, n_chosen], and their weights, fp32."""
        weights, chosen = self.router(x).float().softmax(-1).topk(self.n_chosen, dim=-1)
        return chosen, weights / weights.sum(-1, keepdim=True) if self.normalize else weights

    def kernel_args(self, dtype: torch.dtype) -> kernels.FeedForwardTensors | None:
        """As in TransformerBlock."""
        w13, w2, router = linear_args(dtype, self.w13, self.w2, self.router)
        if not (w13 and w2 and router and is_unmodified(self, MoE) and is_unmodified(self.reduce, nn.Identity)):
            return None
        shared, gate = kernels.FeedForwardTensors([], [], 0), []
        if self.shared is not None:
            shared, (gate,) = self.shared.kernel_args(dtype), linear_args(dtype, self.shared_gate)
        if not shared or gate is None:
            return None
        return kernels.FeedForwardTensors(w13, w2, self.size, router, gate, *shared[:3], self.n_expert, self.n_chosen,
                                          self.normalize)


class Linear(nn.Module):
    """y = x W^T + b. A quantized linear (formats.py) takes its place with the same forward."""

    quantize_activations = False                       # of a quantized one: its setting

    def __init__(self, in_features: int, out_features: int, bias: bool = False, experts: int = 1):
        super().__init__()
        self.in_features, self.out_features, self.experts = in_features, out_features, experts
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = kernels.linear(x, self.weight)
        return y if self.bias is None else y + self.bias

    def first_rows(self, x: Tensor, rows: int) -> Tensor:
        """The first outputs alone; there is no bias in a head."""
        return kernels.linear(x, self.weight[:rows])

    def kernel_args(self, dtype: torch.dtype) -> list[Tensor] | None:
        """What the fused layers compute it from, for inputs of a dtype; None if they cannot."""
        fits = self.weight.dtype == dtype and self.weight.is_contiguous()
        return present(self.weight, self.bias) if fits and is_unmodified(self, Linear) else None

    def expert_args(self, dtype: torch.dtype) -> list[Tensor]:
        """What kernels.experts computes experts from, as kernel_args has them."""
        return [self.weight]


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float, offset: float = 0.0):
        super().__init__()
        self.eps, self.offset = eps, offset            # offset: of the weights
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()                                # rounded once, at the end, as the compiler and the kernels do
        scale, weight = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps), self.weight.float() + self.offset
        return (x32 * scale * weight).type_as(self.weight)


class KVCache(nn.Module):
    """Keys and values of every position so far, each [B, K, T, D]: in the model's dtype or in int8, then with a scale
    for each head and position, fp32 [B, K, T, 1]."""
    k_cache: Tensor
    v_cache: Tensor
    k_scales: Tensor | None
    v_scales: Tensor | None

    def __init__(self, *tensors: Tensor):
        super().__init__()
        for name in ("k_cache", "v_cache", "k_scales", "v_scales"):
            self.register_buffer(name, None, persistent=False)
        self.use(*tensors)

    def use(self, k_cache: Tensor, v_cache: Tensor, k_scales: Tensor | None = None,
            v_scales: Tensor | None = None) -> None:
        self.k_cache, self.v_cache, self.k_scales, self.v_scales = k_cache, v_cache, k_scales, v_scales

    def scales(self) -> list[Tensor]:
        return present(self.k_scales, self.v_scales)

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> None:
        """Writes k, v [B, S, K, D] at input_pos [B, S]."""
        rows = torch.arange(k.size(0), device=k.device)[:, None]
        if self.k_scales is not None and self.v_scales is not None:
            k, self.k_scales[rows, :, input_pos] = kernels.quantize_heads(k)
            v, self.v_scales[rows, :, input_pos] = kernels.quantize_heads(v)
        self.k_cache[rows, :, input_pos] = k
        self.v_cache[rows, :, input_pos] = v


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split RoPE in fp32: x [B, S, H, D]; cos, sin fp32 [B, S, 1, R], for its first R dimensions."""
    turned, rest = x[..., :cos.size(-1)].float(), x[..., cos.size(-1):]
    first, second = turned.chunk(2, dim=-1)
    turned = (turned * cos + torch.cat((-second, first), dim=-1) * sin).type_as(x)
    return torch.cat((turned, rest), dim=-1) if rest.size(-1) else turned


def is_unmodified(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes what its class says: no subclass of it, no hooks, no forward of its own."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    return type(module) is kind and not hooked


def linear_args(dtype: torch.dtype, *linears: Any) -> list[list[Tensor] | None]:
    return [linear.kernel_args(dtype) if hasattr(linear, "kernel_args") else None for linear in linears]


def present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]
