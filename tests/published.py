"""GPTQ and AWQ checkpoints as others publish them, packed by the formats' definitions alone."""
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
