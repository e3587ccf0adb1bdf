"""Gated DeltaNet on a CPU: the operator and its PyTorch twin against a loop over the formulas in fp64, and the fused
layers of hybrids against their modules.

Tolerances are relative to the largest result: fp32 sums that differ by their order; bf16 as in test_kernels.py.
"""
import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import formats
import kernels
from config import ModelArgs
from deltanet import BUFFERS, DeltaState
from generate import Engine, Sampling
from model import Transformer
from quantize import quantize_model
from test_kernels import BF16, FP32, error, needs_ops

SIZE, PENDING, CAPACITY = 4, 16, 999
SHAPES = [(2, 2, 16, 16), (1, 2, 128, 32), (2, 6, 32, 48), (1, 1, 64, 128), (1, 2, 20, 24)]    # Hk, Hv, K, V
LENGTHS = [1, 2, 3, 15, 16, 17, 63, 64, 65, 150]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Text:
    """Random tokens of one DeltaNet, [1, S, ...]."""

    def __init__(self, shape: tuple[int, int, int, int], S: int, dtype: torch.dtype, conv: Tensor | None = None):
        self.Hk, self.Hv, self.K, self.V = self.shape = shape
        N = 2 * self.Hk * self.K + self.Hv * self.V
        self.qkv = torch.randn(1, S, N).to(dtype)
        self.g, self.b = -2 * torch.rand(1, S, self.Hv) ** 4, torch.rand(1, S, self.Hv)
        self.conv = torch.randn(N, SIZE).to(dtype) if conv is None else conv

    def __getitem__(self, part: slice) -> "Text":
        cut = copy.copy(self)
        cut.qkv, cut.g, cut.b = (t[:, part] for t in (self.qkv, self.g, self.b))
        return cut

    def __add__(self, other: "Text") -> "Text":
        joined = copy.copy(self)
        joined.qkv, joined.g, joined.b = (torch.cat((getattr(self, name), getattr(other, name)), dim=1)
                                          for name in ("qkv", "g", "b"))
        return joined

    def state(self, batch: int = 1, max_pending: int = PENDING) -> DeltaState:
        args = ModelArgs("qwen3_next", dim=1, n_layer=1, n_head=1, n_local_heads=1, head_dim=4, intermediate_size=1,
                         vocab_size=1, max_position=1, delta_key_heads=self.Hk, delta_value_heads=self.Hv,
                         delta_key_dim=self.K, delta_value_dim=self.V, conv_size=SIZE)
        return DeltaState(args, batch, max_pending, self.qkv.dtype, torch.device("cpu"))

    def in_fp64(self) -> tuple[Tensor, Tensor]:
        """o [S, Hv, V], and the memory [Hv, K, V] after each token, by the formulas, token by token."""
        S, memory, out, memories = self.qkv.size(1), torch.zeros(self.Hv, self.K, self.V).double(), [], []
        padded = torch.nn.functional.pad(self.qkv[0].double(), (0, 0, SIZE - 1, 0))
        for s in range(S):
            x = torch.nn.functional.silu((padded[s:s + SIZE] * self.conv.double().T).sum(0))
            q, k, v = x.split([self.Hk * self.K, self.Hk * self.K, self.Hv * self.V])
            q, k = (t.view(self.Hk, 1, self.K) for t in (q, k))
            q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
            q, k = (t.expand(-1, self.Hv // self.Hk, -1).flatten(0, 1) for t in (q / self.K ** 0.5, k))
            memory = memory * self.g[0, s].double().exp()[:, None, None]
            read = torch.einsum("hk,hkv->hv", k, memory)
            d = self.b[0, s].double()[:, None] * (v.view(self.Hv, self.V) - read)
            memory = memory + k[:, :, None] * d[:, None]
            out.append(torch.einsum("hk,hkv->hv", q, memory))
            memories.append(memory)
        return torch.stack(out), torch.stack(memories)


Run = Callable[[DeltaState, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
RUNS = {"kernel": DeltaState.run, "twin": DeltaState.run_reference}


def passes(run: Run, state: DeltaState, text: Text, lengths: list[int], start: int = 0) -> Tensor:
    """o [S, Hv, V] of the first row, in passes of so many tokens."""
    out, at = [], 0
    for S in lengths:
        part = text[at:at + S]
        out.append(run(state, part.qkv, part.g, part.b, part.conv, start + at + torch.arange(S)[None])[0])
        at += S
    return torch.cat(out)


def check_memory(state: DeltaState, memories: Tensor, pending: int, tolerance: float) -> None:
    """After a text whose last tokens are pending."""
    taken = len(memories) - pending
    assert (state.length.tolist(), state.pending.tolist()) == ([taken], [pending])
    if taken:
        assert error(state.memory[0], memories[taken - 1]) < tolerance


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_passes_equal_the_formulas(shape: tuple[int, int, int, int], dtype: torch.dtype, run: str) -> None:
    """Of all lengths, and then some of one token and several. Inputs in bf16 are exact, all else is fp32."""
    for first in LENGTHS if shape == SHAPES[0] else (1, 17, 150):
        text = Text(shape, first + 30, dtype)
        expected, memories = text.in_fp64()
        for rest in ([1, 1, 1, 16, 5, 6], [30]):
            state = text.state()
            assert error(passes(RUNS[run], state, text, [first, *rest]), expected) < 3e-5
            check_memory(state, memories, min(rest[-1], PENDING), 3e-5)


@needs_ops
def test_the_operator_runs_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeltaState, "run_reference", lambda *arguments: None)
    for shape in SHAPES:
        text = Text(shape, 1, FP32)
        out = DeltaState.run(text.state(), text.qkv, text.g, text.b, text.conv, torch.zeros(1, 1, dtype=torch.int64))
        assert (out is None) == (shape == SHAPES[-1])


@pytest.mark.parametrize("run", RUNS)
def test_pending_tokens_are_taken_back(run: str) -> None:
    """All, some and none of them, by passes of few tokens and of many; then everything, by a text of its own."""
    for kept, S in ((0, 1), (1, 5), (7, 40), (16, 3), (16, 100)):
        text = Text(SHAPES[2], 37, FP32)
        state, other = text.state(), Text(SHAPES[2], S + 4, FP32, text.conv)
        passes(RUNS[run], state, text, [20, 17])                  # of the latter, 16 stay pending
        joined = text[:21 + kept] + other
        expected, memories = joined.in_fp64()
        y = passes(RUNS[run], state, other, [S, 4], 21 + kept)
        assert error(y, expected[21 + kept:]) < 3e-5
        check_memory(state, memories, 4, 3e-5)
        again = Text(SHAPES[2], 9, FP32, text.conv)
        state.memory.fill_(torch.nan)
        if run == "kernel":                                        # the twin multiplies by 0
            assert error(passes(RUNS[run], state, again, [5, 4]), again.in_fp64()[0]) < 3e-5


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("S", [1, 9, 16, 40, 200])
def test_rows_that_end_in_padding(S: int, run: str) -> None:
    """Junk in the padding, of all lengths, and a next pass in which the rows stand at different positions."""
    rows = [Text(SHAPES[2], S, FP32) for _ in range(4)]
    real = [S, max(1, S - 3), max(1, S - 20), 1]
    more = [Text(SHAPES[2], 2, FP32) for _ in rows]
    for row, text in enumerate(rows + more):
        text.conv = rows[0].conv
        if row < 4:
            text.qkv[:, real[row]:] = 1e3
    state = rows[0].state(batch=4)

    def together(texts: list[Text], positions: Tensor) -> Tensor:
        qkv, g, b = (torch.cat([getattr(text, name) for text in texts]) for name in ("qkv", "g", "b"))
        return RUNS[run](state, qkv, g, b, rows[0].conv, positions)
    positions = torch.stack([torch.where(torch.arange(S) < n, torch.arange(S), CAPACITY) for n in real])
    first = together(rows, positions)
    second = together(more, torch.tensor(real)[:, None] + torch.arange(2))
    for row, n in enumerate(real):
        expected, _ = (rows[row][:n] + more[row]).in_fp64()
        assert error(torch.cat((first[row, :n], second[row])), expected) < 3e-5
    assert state.pending.tolist() == [2] * 4 and state.length.tolist() == real


@needs_ops
def test_a_pass_that_follows_on_nothing_is_forgotten() -> None:
    """As all padding; and nothing follows on a pass that was cut short, until the text begins anew."""
    text = Text(SHAPES[0], 40, FP32)
    for run in RUNS.values():
        state = text.state()
        passes(run, state, text, [20, 4])
        run(state, text.qkv[:, :3], text.g[:, :3], text.b[:, :3], text.conv, 30 + torch.arange(3)[None])
        check_memory(state, text[:24].in_fp64()[1], 0, 3e-5)
        state.invalidate()
        passes(run, state, text, [3], 24)
        assert not state.pending.any()
        assert error(passes(run, state, text, [40]), text.in_fp64()[0]) < 3e-5


@needs_ops
def test_threads_share_the_heads() -> None:
    text, threads = Text((4, 8, 32, 64), 100, BF16), torch.get_num_threads()
    try:
        results = []
        for n in (1, 4):
            torch.set_num_threads(n)
            results.append(passes(DeltaState.run, text.state(), text, [80, 20]))
        assert torch.equal(*results) and error(results[0], text.in_fp64()[0]) < 3e-5
    finally:
        torch.set_num_threads(threads)


def arguments(S: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    text = Text(SHAPES[2], S, FP32)
    return (dict(qkv=text.qkv, g=text.g, b=text.b, conv=text.conv, input_pos=torch.arange(S)[None]),
            dict(zip(BUFFERS, text.state().tensors())))


@needs_ops
def test_the_operator_and_its_fake_agree() -> None:
    for S in (3, 30):
        inputs, state = arguments(S)
        torch.library.opcheck(torch.ops.qwen_fast.delta_net, (*inputs.values(), list(state.values())),
                              test_utils=("test_faketensor",))


@needs_ops
@pytest.mark.parametrize("change", [
    dict(qkv=lambda t: t[..., 1:]), dict(qkv=lambda t: t.bfloat16()), dict(qkv=lambda t: t[:, :0]),
    dict(g=lambda t: t[:, 1:]), dict(b=lambda t: t.double()), dict(conv=lambda t: t[:, 1:]),
    dict(conv=lambda t: t.double()), dict(input_pos=lambda t: t.int()), dict(input_pos=lambda t: t[:, 1:]),
    dict(memory=lambda t: t[:, 1:]), dict(memory=lambda t: t.bfloat16()), dict(memory=lambda t: t[..., :8]),
    dict(memory=lambda t: t[0]), dict(length=lambda t: t.int()), dict(inputs=lambda t: t[:, 1:]),
    dict(inputs=lambda t: t.bfloat16()), dict(pending=lambda t: t.expand(2)), dict(keys=lambda t: t[:, 1:]),
    dict(updates=lambda t: t.transpose(1, 2)), dict(decays=lambda t: t[..., 1:])],
    ids=lambda change: next(iter(change)))
def test_what_does_not_fit_is_refused(change: dict[str, Callable[[Tensor], Tensor]]) -> None:
    inputs, state = arguments()
    for tensors in (inputs, state):
        tensors |= {name: f(tensors[name]) for name, f in change.items() if name in tensors}
    with pytest.raises(RuntimeError):
        torch.ops.qwen_fast.delta_net(**inputs, state=list(state.values()))


# ---- whole layers

HYBRID = dict(dim=64, n_layer=4, n_head=4, n_local_heads=2, head_dim=32, intermediate_size=96, vocab_size=160,
              max_position=512, qk_norm=True, rope_base=1e4, delta_layers=(0, 1, 2), delta_key_heads=2,
              delta_value_heads=4, delta_key_dim=16, delta_value_dim=32, conv_size=SIZE, rotary_dim=8,
              output_gate=True, norm_offset=1.0)
MOE = dict(n_expert=8, n_expert_per_token=3, expert_size=48, shared_expert_size=80, normalize_experts=True)
FAMILIES = {"qwen3_next": dict(MOE, dense_layers=(1,)), "qwen3_5": dict(tie_word_embeddings=True),
            "qwen3_5_moe": dict(MOE, delta_value_heads=2, rotary_dim=16)}
IDS = torch.randint(0, 160, (3, 150), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Transformer:
    return hybrid(request.param)


def hybrid(family: str) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelArgs(family, **HYBRID | FAMILIES[family]))
    for name, parameter in model.named_parameters():
        mean = float("linear" in name or "attention.norm" in name)
        torch.nn.init.normal_(parameter, mean=mean, std=0.3 if parameter.dim() == 1 else 0.08)
    return model


def run_steps(model: Transformer, B: int, steps: tuple[int, ...], fuse: bool) -> tuple[Tensor, list[Tensor]]:
    """Logits of passes over so many tokens, or, if negative, from so many tokens before on; and what is remembered."""
    model.setup_caches(B, 200)
    fused, at, logits = model.fuse() if fuse else None, 0, []
    assert kernels.accepts(fused, torch.zeros(B, 1, model.args.dim, dtype=model.dtype)) == fuse
    for S in steps:
        if S > 0:
            logits.append(model(IDS[:B, at:at + S], torch.arange(at, at + S), torch.arange(S), fused).float())
        at += S
    remembered = [tensor.clone() for state in model.delta_states() for tensor in state.tensors()[:4]]
    model.max_batch_size = 0                           # new caches next time
    return torch.cat(logits, dim=1), remembered


STEPS = [(1, (40, 1, 1, 5, -3, 16, 17)), (1, (1, 2, 70)), (3, (7, 1, 2, -1, 20))]


@torch.inference_mode()
@needs_ops
@pytest.mark.parametrize("mode", [None, "int8", "int4"])
def test_fused_layers_equal_the_modules(model: Transformer, mode: str | None) -> None:
    """Prefill, few tokens, one, and again from an earlier position on. Quantized: with activations as they are."""
    model = copy.deepcopy(model)
    if mode:
        quantize_model(model, mode)
        formats.set_quantize_activations(model, False)
    for B, steps in STEPS:
        (mine, my_states), (theirs, their_states) = (run_steps(model, B, steps, fuse) for fuse in (True, False))
        assert error(mine, theirs.double()) < 1e-5
        for a, b in zip(my_states, their_states, strict=True):
            assert torch.equal(a, b) if a.dtype == torch.int64 else error(a, b.double()) < 1e-4


@torch.inference_mode()
@needs_ops
@pytest.mark.parametrize("mode", [None, "int8"])
def test_fused_layers_in_bf16_are_no_less_exact_than_the_modules(model: Transformer, mode: str | None) -> None:
    """Against the modules in fp32 with the same weights: the median of the tokens' errors, because rounding may choose
    another expert for some. Norms of few dimensions after few tokens make the most of it, by tens of percent."""
    model = copy.deepcopy(model).to(BF16)
    if mode:
        quantize_model(model, mode)
        formats.set_quantize_activations(model, False)
    for B, steps in STEPS:
        exact, _ = run_steps(copy.deepcopy(model).float(), B, steps, False)
        mine, theirs = ((run_steps(model, B, steps, fuse)[0] - exact).square().mean(-1).sqrt().median()
                        for fuse in (True, False))
        assert mine < 1.2 * theirs < 0.1 * exact.std(), (mine, theirs)


@torch.inference_mode()
@needs_ops
def test_changes_of_a_hybrid_take_effect(model: Transformer) -> None:
    """What the fused layers would miss leaves them out."""
    def fused(change: Callable[[Transformer], object]) -> object:
        changed = copy.deepcopy(model)
        changed.setup_caches(1, 32)
        change(changed)
        return changed.fuse()
    assert fused(lambda m: None) is not None
    for name in ("1.attention", "1.attention.norm", "1.attention.wba", "1.attention.reduce", "1.ffn_norm",
                 "3.attention.k_norm"):
        assert fused(lambda m, name=name: m.layers.get_submodule(name).register_forward_hook(lambda *_: None)) is None
    assert fused(lambda m: m.layers[0].attention.state.bfloat16()) is None


@needs_ops
@torch.inference_mode()
def test_compiled_hybrids_equal_eager_ones() -> None:
    """By the fused layers, and by the modules where one of them is hooked."""
    model, prompt, greedy = hybrid("qwen3_5"), IDS[0, :40].tolist(), Sampling(temperature=0)
    expected = list(Engine(model).generate(prompt, 12, greedy))
    assert list(Engine(model, compile=True).generate(prompt, 12, greedy)) == expected
    model.layers[2].attention.reduce = torch.nn.Dropout(0.0).eval()
    engine = Engine(model, compile=True)
    assert list(engine.generate(prompt, 12, greedy)) == expected and engine.fused is None
