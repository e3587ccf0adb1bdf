"""Lowers the model's compiled steps for CUDA on a machine without a GPU, up to the Triton code, which nothing runs.

    python tests/cuda_lowering.py int8 bf16 [only steps whose names match]

Needs PyTorch's build for CUDA: fake tensors stand for memory, and made-up properties for the device, in bf16 an H100,
in fp16 an RTX 2080. Prints a line per step: its name, and "lowered" or what is wrong: the error, or that it waits for
the device, is cut into several CUDA graphs, or sums over ranks elsewhere. test_cuda_lowering.py runs it.
"""
import dataclasses
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ |= dict(QWEN_FAST_KERNELS="off", TORCHINDUCTOR_COMPILE_THREADS="1", TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch._dynamo.device_interface
import torch._inductor.config
import torch._inductor.fx_passes.joint_graph as joint_graph
import torch._inductor.fx_passes.post_grad as post_grad
import triton
from torch._inductor.graph import GraphLowering
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget

CUDA = torch.device("cuda", 0)
COMMON = dict(warp_size=32, uuid="0", regs_per_multiprocessor=65536, max_threads_per_block=1024, gcnArchName="",
              shared_memory_per_block=49152, is_integrated=0, is_multi_gpu_board=0, pci_bus_id=0, pci_device_id=0,
              pci_domain_id=0)
DEVICES = {
    torch.bfloat16: SimpleNamespace(
        name="H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, L2_cache_size=50 << 20,
        max_threads_per_multi_processor=2048, shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472, **COMMON),
    torch.float16: SimpleNamespace(
        name="RTX 2080", major=7, minor=5, multi_processor_count=46, total_memory=8 << 30, L2_cache_size=4 << 20,
        max_threads_per_multi_processor=1024, shared_memory_per_block_optin=65536,
        shared_memory_per_multiprocessor=65536, **COMMON)}
DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16)
WAITS = re.compile(r"\.item\(|\.tolist\(|\.cpu\(|_local_scalar_dense|empty_strided_cpu\(|device='cpu'")
written: list[str] = []              # the code of the last step


NAMES = {"experts": "Qwen1.5-MoE-A2.7B", "hybrid": "Qwen3.5-0.8B", "hybrid of experts": "Qwen3.5-35B-A3B"}


class Lowered(Exception):
    """In place of compiling the code that has been written."""


class Device:
    """torch.cuda.device, which would switch devices."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


class Driver:
    """Triton's, which would ask the GPU."""
    is_active = staticmethod(lambda: True)

    def __init__(self, properties: SimpleNamespace):
        self.target = GPUTarget("cuda", 10 * properties.major + properties.minor, 32)
        self.utils = SimpleNamespace(get_device_properties=lambda device: dict(
            max_shared_mem=properties.shared_memory_per_block_optin,
            multiprocessor_count=properties.multi_processor_count))

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device=0):
        return 0

    def get_active_torch_device(self):
        return CUDA

    def get_benchmarker(self):
        return lambda *args, **options: [1.0]


def pretend_there_is_a_gpu(properties: SimpleNamespace) -> None:
    """Patches PyTorch and Triton for the rest of this process."""
    asked = dict(is_available=True, device_count=1, current_device=0, get_device_properties=properties,
                 get_device_capability=(properties.major, properties.minor), get_device_name=properties.name,
                 is_bf16_supported=properties.major >= 8, synchronize=None, _lazy_init=None, set_rng_state=None,
                 get_rng_state=torch.zeros(16, dtype=torch.uint8), current_stream=SimpleNamespace(cuda_stream=0),
                 memory_reserved=0, memory_allocated=0, mem_get_info=(properties.total_memory,) * 2)
    for name, answer in asked.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **options: answer)
    interface = torch._dynamo.device_interface.CudaInterface
    for name, answer in dict(asked, exchange_device=0, maybe_exchange_device=0, get_raw_stream=0).items():
        if hasattr(interface, name):
            setattr(interface, name, staticmethod(lambda *args, answer=answer, **options: answer))
    torch.cuda.device = torch.cuda._DeviceGuard = interface.device = Device
    torch._C._ensureCUDADeviceGuardSet()
    torch._subclasses.fake_tensor.init_gpu_context = lambda device: None
    torch.accelerator.current_accelerator = lambda check_available=False: None
    torch.accelerator.is_available = lambda: False
    torch._inductor.config.shape_padding = False                   # it would measure
    triton.runtime.driver.set_active(Driver(properties))

    for module in (joint_graph, post_grad):                        # their patterns are traced with real tensors
        def on_cpu(device=None, original=module.lazy_init):
            with mock.patch.object(torch.cuda, "is_available", lambda: False):
                return original(torch.device("cpu"))
        module.lazy_init = on_cpu
    fold = joint_graph.UniformValueConstantFolder._deduce_value

    def fold_on_cpu(self, node):
        options = dict(node.kwargs)
        try:
            if isinstance(options.get("device"), torch.device):
                node.kwargs = {**options, "device": torch.device("cpu")}
            return fold(self, node)
        finally:
            node.kwargs = options
    joint_graph.UniformValueConstantFolder._deduce_value = fold_on_cpu

    def write_code(self):
        code, _ = self.codegen()
        written.append(getattr(code, "value", code))
        raise Lowered
    GraphLowering.compile_to_module = write_code


def make_model(kind: str, args):
    """Of few layers, quantized to `kind`; or of which this process is to be one of two ranks."""
    import formats
    import tp
    from kernels import collectives
    from model import Transformer

    if kind in ("ranks", "one launch"):
        from torch.testing._internal.distributed.fake_pg import FakeStore
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        ranks = tp.Ranks(0, 2, 0, 2, torch.distributed.group.WORLD.group_name, None, None)
        if kind == "one launch":
            collectives.symmetric[ranks.group] = torch.zeros(collectives.ONE_SHOT_BYTES, dtype=torch.uint8, device=CUDA)
        model = tp.build(tp.plan(args, 0, 2), ranks)
        state = {key: torch.zeros_like(tensor, device=CUDA) for key, tensor in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        return model
    with CUDA:
        model = Transformer(args)
    if kind != "none" and kind not in NAMES:
        mode, reordered = ("int4-fp16", formats.linear_names(model)) if kind == "act-order" else (kind, [])
        how = formats.Quantization(mode, 128, "none" if mode.endswith("-fp16") else "int8", reordered=tuple(reordered))
        for _, linear in formats.replace_linears(model, how):
            for name, buffer in linear.named_buffers():
                linear.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=CUDA))
        formats.pack_for(model, CUDA)
    return model


def zeros(*shape: int, of: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.zeros(*shape, dtype=of, device=CUDA)


def steps(kind: str, dtype: torch.dtype):
    """(name, call) for every step of a Qwen3-0.6B of two layers, or of another model, as in NAMES."""
    import kernels
    from config import ModelArgs
    from generate import Engine, decode_one_token
    from sampling import Sampling, compile_step

    args = ModelArgs.from_name(NAMES.get(kind, "Qwen3-0.6B"))
    args = dataclasses.replace(args, n_layer=4 if args.delta_layers else 2, windows=())
    torch.set_default_dtype(dtype)
    model, kernels.chosen["gpu"] = make_model(kind, args), "triton"          # auto would measure
    torch.set_default_dtype(torch.float32)
    model.setup_caches(1, 256)
    engine, V = Engine(model, compile=True, draft="ngram", speculate_k=4), args.vocab_size
    speculator, fused = engine.speculator, model.fuse()

    for name, sampling in (("greedy", Sampling(0)), ("top_k", Sampling()), ("top_p", Sampling(1.0, None, 0.9)),
                           ("all", Sampling(1.0, None))):
        choice = sampling.choice(V)._replace(limits=zeros(3, of=torch.float32))
        n, fp32 = choice.candidates, torch.float32
        if name in ("top_p", "all") and kind != "none":        # what follows the logits is the same in every kind
            continue
        yield f"decode, {name}", lambda: engine.run_decode(model, None, V, zeros(1, 1), zeros(1, 1), choice,
                                                           zeros(1, n, of=fp32))
        if name in ("top_p", "all"):
            continue
        if fused and n:                    # compiled without CUDA graphs: RecordedStep makes one, of real memory
            yield "decode, fused", lambda: engine.run_decode.step(model, fused, V, zeros(1, 1), zeros(1, 1), choice,
                                                                  zeros(1, n, of=fp32))
            yield "verify, fused", lambda: speculator.verify.step(
                fused, zeros(1, 5), zeros(1, 5), choice, None, None, zeros(4, of=fp32), zeros(1, n, of=fp32))
        drafts = {", model": (zeros(4, n, of=fp32), zeros(4, n))} if n else {"": (None, None)}
        if n and kind == "none":
            drafts[", ngram"] = None, None
        for draft, probs in drafts.items():
            yield f"verify, {name}{draft}", lambda: speculator.verify(
                None, zeros(1, 5), zeros(1, 5), choice, *probs, zeros(4, of=fp32), zeros(1, n, of=fp32))
    if kind in ("none", "int4"):
        yield "40 requests", lambda: answer_requests(Engine(model, compile=True), V)
    model.setup_caches(3, 256)
    batch, fused = compile_step(decode_one_token, model), model.fuse()
    inputs = V, zeros(3, 1), zeros(3, 1), choice, zeros(3, n, of=fp32)
    yield "batch", lambda: batch(model, None, *inputs)
    if fused:
        yield "batch, fused", lambda: batch.step(model, fused, *inputs)
    model.setup_caches(1, 512)
    idx, input_pos, fused = zeros(1, 300), torch.arange(300, device=CUDA), model.fuse()
    torch._dynamo.maybe_mark_dynamic(idx, 1)
    torch._dynamo.maybe_mark_dynamic(input_pos, 0)
    yield "prefill", lambda: torch.compile(model.forward, fullgraph=True)(idx, input_pos, zeros(1, 1))
    if fused and fused.max_tokens >= 300:
        yield "prefill, fused", lambda: torch.compile(model.forward, fullgraph=True)(idx, input_pos, zeros(1, 1), fused)


def answer_requests(engine, V: int) -> str:
    """Of different temperature, top_k, top_p and length, the longest first: how often the two decoding steps were
    compiled, that of fused layers and that of modules."""
    from sampling import Sampling

    compiled: list[str] = []
    with mock.patch("torch._inductor.compile_fx.compile_fx",
                    lambda graph, inputs, **options: compiled.append("") or graph.forward):
        counts = []
        for fused in (True, False):
            compiled.clear()
            for i in range(40):
                engine.reserve(1, 1000 - 23 * i)
                sampling = Sampling(0.1 + i / 20, (200, 1 + i)[i % 2], (None, 0.5 + i / 100)[i // 2 % 2])
                choice = sampling.choice(V)._replace(limits=zeros(3, of=torch.float32))
                step = engine.run_decode.step if fused else engine.run_decode.by_compiler
                step(engine.model, engine.fused if fused else None, V, zeros(1, 1), zeros(1, 1), choice,
                     zeros(1, choice.candidates, of=torch.float32))
            counts.append(len(compiled))
    return f"compiled {counts[0]} and {counts[1]} times"


def problem(kind: str, name: str, code: str) -> str | None:
    """What is wrong with a step's code."""
    code = re.split(r"^def (?:get_args|benchmark_compiled_module)\(", code, flags=re.M)[0]
    code = re.sub(r"^ *#.*", "", code, flags=re.M)
    if found := WAITS.search(code):
        return f"waits for the device: {found[0]}"
    if (graphs := len(re.findall(r"^def partition_\d+\(", code, re.M))) > 1:
        return f"is cut into {graphs} CUDA graphs"
    sums = [len(re.findall(op + r"\.default\(", code)) for op in (r"all_reduce_", "one_shot_all_reduce")]
    wanted = 3           # of the embedding, of attention and of feed-forward: the layers call one function in turn
    expected = {"ranks": [wanted, 0], "one launch": [wanted, 0] if name == "prefill" else [0, wanted]}
    if sums != expected.get(kind, [0, 0]):
        return f"sums over ranks: {sums[0]} by NCCL, {sums[1]} in one launch"
    return None


def main(kind: str, dtype: str, only: str = "") -> None:
    pretend_there_is_a_gpu(DEVICES[DTYPES[dtype]])
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        for name, call in steps(kind, DTYPES[dtype]):
            if not re.search(only, name):
                continue
            torch._dynamo.reset()
            written.clear()
            try:
                said = call()
                said = said if isinstance(said, str) else "was not compiled"
            except Exception as error:
                causes = [error]
                while cause := causes[-1].__cause__ or causes[-1].__context__:
                    causes.append(cause)
                lowered = any(isinstance(cause, Lowered) for cause in causes) or "Lowered" in str(error)
                said = (problem(kind, name, written[-1]) or "lowered" if lowered else
                        f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            print(f"{name}: {said}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
