"""Lowers the model's compiled steps for CUDA on a machine without a GPU, up to the Triton code, which nothing runs.

    python tests/cuda_lowering.py int8 bf16

Needs PyTorch's build for CUDA: fake tensors stand for memory, and made-up properties for the device (an H100). Prints a
line per step: its name, and "lowered" or the error. test_cuda_lowering.py runs it.
"""
import dataclasses
import os
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
PROPERTIES = SimpleNamespace(
    name="H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, warp_size=32, uuid="0",
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20, gcnArchName="", is_integrated=0, is_multi_gpu_board=0, pci_bus_id=0, pci_device_id=0,
    pci_domain_id=0)


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
    utils = SimpleNamespace(get_device_properties=lambda device: dict(
        max_shared_mem=PROPERTIES.shared_memory_per_block_optin, multiprocessor_count=PROPERTIES.multi_processor_count))
    is_active = staticmethod(lambda: True)

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

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


def pretend_there_is_a_gpu() -> None:
    """Patches PyTorch and Triton for the rest of this process."""
    asked = dict(is_available=True, device_count=1, current_device=0, get_device_properties=PROPERTIES,
                 get_device_capability=(9, 0), get_device_name="H100", is_bf16_supported=True, synchronize=None,
                 _lazy_init=None, set_rng_state=None, get_rng_state=torch.zeros(16, dtype=torch.uint8),
                 current_stream=SimpleNamespace(cuda_stream=0))
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
    triton.runtime.driver.set_active(Driver())

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
        self.codegen()
        raise Lowered
    GraphLowering.compile_to_module = write_code


def steps(kind: str, dtype: torch.dtype):
    """(name, call) for every step of a Qwen3-0.6B of two layers, quantized to `kind`; or of a model with experts."""
    import formats
    from config import ModelArgs
    from generate import Engine, decode_one_token
    from model import Transformer
    from sampling import Sampling, compile_step

    name = "Qwen1.5-MoE-A2.7B" if kind == "experts" else "Qwen3-0.6B"
    args = dataclasses.replace(ModelArgs.from_name(name), n_layer=2, windows=())
    torch.set_default_dtype(dtype)
    with CUDA:
        model = Transformer(args)
    torch.set_default_dtype(torch.float32)
    if kind not in ("none", "experts"):
        head = "none" if kind.endswith("-fp16") else "int8"
        for _, linear in formats.replace_linears(model, formats.Quantization(kind, 128, head)):
            for name, buffer in linear.named_buffers():
                linear.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=CUDA))
        formats.pack_for(model, CUDA)
    model.setup_caches(1, 256)
    engine, V = Engine(model, compile=True, draft="ngram", speculate_k=4), args.vocab_size
    speculator, fused = engine.speculator, model.fuse()

    def zeros(*shape: int, of: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(*shape, dtype=of, device=CUDA)

    for name, sampling in (("greedy", Sampling(0)), ("top_k", Sampling()), ("top_p", Sampling(1.0, None, 0.9)),
                           ("all", Sampling(1.0, None))):
        choice = sampling.choice(V)._replace(limits=zeros(3, of=torch.float32))
        n, fp32 = choice.candidates, torch.float32
        yield f"decode, {name}", lambda: engine.run_decode(model, None, V, zeros(1, 1), zeros(1, 1), choice,
                                                           zeros(1, n, of=fp32))
        if name not in ("greedy", "top_k"):
            continue
        if fused and n:                    # compiled without CUDA graphs: RecordedStep makes one, of real memory
            yield "decode, fused", lambda: engine.run_decode.step(model, fused, V, zeros(1, 1), zeros(1, 1), choice,
                                                                  zeros(1, n, of=fp32))
            yield "verify, fused", lambda: speculator.verify.step(
                fused, zeros(1, 5), zeros(1, 5), choice, None, None, zeros(4, of=fp32), zeros(1, n, of=fp32))
        for drafted in (None, 4):
            probs = (zeros(4, n, of=fp32), zeros(4, n)) if drafted and n else (None, None)
            yield f"verify, {name}, {'model' if drafted else 'ngram'}", lambda: speculator.verify(
                None, zeros(1, 5), zeros(1, 5), choice, *probs, zeros(4, of=fp32), zeros(1, n, of=fp32))
    model.setup_caches(3, 256)
    yield "batch", lambda: compile_step(decode_one_token, model)(model, None, V, zeros(3, 1), zeros(3, 1), choice,
                                                                 zeros(3, n, of=fp32))
    model.setup_caches(1, 512)
    idx, input_pos = zeros(1, 300), torch.arange(300, device=CUDA)
    torch._dynamo.maybe_mark_dynamic(idx, 1)
    torch._dynamo.maybe_mark_dynamic(input_pos, 0)
    yield "prefill", lambda: torch.compile(model.forward, fullgraph=True)(idx, input_pos, zeros(1, 1))


def main(kind: str, dtype: str) -> None:
    pretend_there_is_a_gpu()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        for name, call in steps(kind, dict(bf16=torch.bfloat16, fp16=torch.float16)[dtype]):
            torch._dynamo.reset()
            try:
                call()
                said = "was not compiled"
            except Exception as error:
                causes = [error]
                while cause := causes[-1].__cause__ or causes[-1].__context__:
                    causes.append(cause)
                lowered = any(isinstance(cause, Lowered) for cause in causes) or "Lowered" in str(error)
                said = "lowered" if lowered else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"{name}: {said}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
