"""Checkpoints as others publish them: GPTQ, AWQ and FP8 by the formats' definitions alone, compressed-tensors by its
own library."""
import json
import re

import torch

import tiny


def pack_words(q, bits, order=range(8)):
    """Integers [R, C * 32 / bits] -> int32 [R, C]: in each run of them the one at order[i] moves to bit i * bits."""
    per, words = 32 // bits, []
    for row in q.tolist():
        values = [sum(row[i + order[k]] << k * bits for k in range(per)) for i in range(0, len(row), per)]
        words.append([value - (1 << 32) if value >> 31 else value for value in values])
    return torch.tensor(words, dtype=torch.int32)


def publish(folder, method="gptq", bits=4, groupsize=32, sym=True, desc_act=False, form="gptq", biases=False,
            skip=r"\.mlp\.gate$|shared_expert_gate", **config):
    """Quantizes a Hugging Face folder's linears but for `skip`, and packs them by the format's definition.

    Returns module -> the weights that they stand for, in fp16 and fp32.
    """
    tensors, meant = tiny.load_file(folder / "model.safetensors"), {}
    torch.manual_seed(1)
    orders = {}
    for name in [name for name in tensors if tensors[name].ndim == 2 and re.search(r"\.(layers|h)\.", name)]:
        module = name.removesuffix(".weight")
        if re.search(skip, module):
            continue
        w = tensors.pop(name)
        N, K = w.shape
        G = K if groupsize == -1 else groupsize
        g_idx = torch.arange(K) // G
        if desc_act:                                             # linears that share an input share their order
            inputs = (*module.split(".")[2:4], module[-6:] in ("o_proj", "n_proj"))
            g_idx = orders.setdefault(inputs, g_idx[torch.randperm(K)])
        groups, most = int(g_idx.max()) + 1, 2 ** bits - 1
        scales, zeros = torch.empty(groups, N, dtype=torch.float16), torch.empty(groups, N, dtype=torch.int64)
        for g in range(groups):
            group = w[:, g_idx == g]
            low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
            scales[g] = (2 * group.abs().amax(1) / most if sym else (high - low) / most).half()
            zeros[g] = (most + 1) // 2 if sym else (-low / scales[g]).round().clamp(0, most)
        if not sym:
            zeros[0, 0], zeros[-1, -1] = most, 1                 # the ends of what either convention can say
        q = (w.t() / scales[g_idx] + zeros[g_idx]).round().clamp(0, most).long()         # [K, N]
        steps = q - zeros[g_idx]
        meant[module] = (steps.half() * scales[g_idx]).t(), (steps.float() * scales[g_idx].float()).t()
        if method == "gptq":
            tensors |= {f"{module}.qweight": pack_words(q.t(), bits).t().contiguous(), f"{module}.g_idx": g_idx.int(),
                        f"{module}.qzeros": pack_words(zeros - int(form == "gptq"), bits)}
        else:
            order = [0, 2, 4, 6, 1, 3, 5, 7]
            tensors |= {f"{module}.qweight": pack_words(q, 4, order), f"{module}.qzeros": pack_words(zeros, 4, order)}
        tensors[f"{module}.scales"] = scales
        if biases and f"{module}.bias" not in tensors:
            tensors[f"{module}.bias"] = torch.zeros(N)
    tiny.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    both = {"quant_method": method, "bits": bits, "group_size": groupsize}
    own = {"version": "gemm", "zero_point": True}
    if method == "gptq":
        own = {"sym": sym, "desc_act": desc_act, "checkpoint_format": form}
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {**both, **own, **config}}))
    return meant


# ---- compressed-tensors and FP8

LEFT = r"\.mlp\.gate$|lm_head|embed|shared_expert_gate"


def publish_compressed(folder, weights=None, form="pack-quantized", scale_dtype=torch.bfloat16, skip=LEFT, groups=None,
                       act_order=False, input_scales=False, **config):
    """Quantizes a Hugging Face folder's linears but for `skip` with compressed-tensors' own compressors.

    weights: of its QuantizationArgs. groups: pattern -> (weights, form), where there are several. Returns module -> the
    weight in fp32 that its parts stand for, by the library's own arithmetic.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    tensors, meant, schemes = tiny.load_file(folder / "model.safetensors"), {}, {}
    rng, orders = torch.Generator().manual_seed(1), {}
    for number, (pattern, (own, own_form)) in enumerate((groups or {"": (weights, form)}).items()):
        targets = [f"re:{pattern}"] if groups else ["Linear"]
        args = QuantizationArgs(**own)
        activations = QuantizationArgs(num_bits=8, type=args.type, dynamic=True, strategy="token", symmetric=True)
        schemes[pattern] = f"group_{number}", QuantizationScheme(
            targets=targets, weights=args, format=own_form, input_activations=activations if input_scales else None)
    ignored = []
    for name in [name for name in tensors if tensors[name].ndim == 2 and name.endswith(".weight")]:
        module = name.removesuffix(".weight")
        scheme = next((scheme for pattern, (_, scheme) in schemes.items() if re.match(pattern, module)), None)
        if re.search(skip, module) or scheme is None:
            ignored.append(module)
            continue
        w = tensors.pop(name).float()
        inputs = (*module.split(".")[2:4], module[-6:] in ("o_proj", "n_proj"))
        order = torch.arange(w.size(1))
        if act_order:                    # linears that share an input share their order
            order = orders.setdefault(inputs, torch.randperm(w.size(1), generator=rng))
        state = {"weight": w[:, order], **qparams(w[:, order], scheme.weights, scale_dtype)}
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        parts = compressor.compress(state, scheme)
        exact = {kind: part.float() if part.dtype in (torch.bfloat16, torch.float16) else part
                 for kind, part in parts.items()}
        back = order.argsort()
        meant[module] = compressor.decompress(exact, scheme)["weight"].float()[:, back]
        if act_order:                    # which versions of the library up to 0.17 wrote, and weight_g_idx
            q = unpack_from_int32(parts["weight_packed"], 4, w.shape)[:, back].contiguous()
            parts["weight_packed"] = pack_to_int32(q, 4)
            parts["weight_g_idx"] = (back // scheme.weights.group_size).int()
        tensors |= {f"{module}.{kind}": part.contiguous() for kind, part in parts.items()}
        if input_scales:
            tensors[f"{module}.input_scale"] = torch.ones(1)
    tiny.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    forms = {scheme.format for _, scheme in schemes.values()}
    stated = QuantizationConfig(config_groups=dict(schemes.values()), quantization_status="compressed", ignore=ignored,
                                format=forms.pop() if len(forms) == 1 else "mixed-precision").model_dump(mode="json")
    if act_order:
        stated["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {**stated, **config}}))
    return meant


def qparams(w, args, dtype):
    """Scales and zero points by least and greatest values."""
    (N, K), most = w.shape, 448.0 if args.type == "float" else 2 ** args.num_bits - 1
    if args.strategy == "block":
        rows, columns = args.block_structure
        padded = torch.nn.functional.pad(w.abs(), (0, -K % columns, 0, -N % rows))
        blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        return {"weight_scale": (blocks.amax((1, 3)) / 448).to(dtype)}
    G = args.group_size if args.strategy == "group" else K
    grouped = w.unflatten(1, (-1, G))
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    if args.strategy == "tensor":
        low, high = low.amin(0), high.amax(0)
    greatest = torch.maximum(-low, high)
    scale = (greatest / 448 if args.type == "float" else 2 * greatest / most if args.symmetric else (high - low) / most)
    found = {"weight_scale": scale.to(dtype)}
    if not args.symmetric:
        half = (most + 1) // 2
        found["weight_zero_point"] = ((-low / found["weight_scale"].float()).round() - half).clamp(-half, half - 1).to(
            torch.int8)
    return found


def publish_block_fp8(folder, block=(128, 128), skip=LEFT, dtype=torch.float32):
    """quant_method fp8, by the definition: each block of the weight is float8 times weight_scale_inv."""
    tensors, meant, (rows, columns) = tiny.load_file(folder / "model.safetensors"), {}, block
    for name in [name for name in tensors if tensors[name].ndim == 2 and name.endswith(".weight")]:
        module, w = name.removesuffix(".weight"), tensors[name].float()
        if re.search(skip, module):
            continue
        scales = torch.empty(-(-w.size(0) // rows), -(-w.size(1) // columns))
        q, meant[module] = torch.empty_like(w, dtype=torch.float8_e4m3fn), torch.empty_like(w)
        for i in range(scales.size(0)):
            for j in range(scales.size(1)):
                at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                scales[i, j] = (w[at].abs().max() / 448).to(dtype)
                q[at] = (w[at] / scales[i, j]).to(torch.float8_e4m3fn)
                meant[module][at] = q[at].float() * scales[i, j]
        tensors |= {name: q, f"{module}.weight_scale_inv": scales.to(dtype)}
    tiny.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}}))
    return meant
