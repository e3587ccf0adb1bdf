"""checkpoint.py: what is in the file, what is refused, and what is found when it is damaged."""
import os
import random
import shutil
import socket
import subprocess
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantize
from checkpoint import check_finite, read_checkpoint, verify_checkpoint, write_checkpoint
from cli import UserError
from convert import convert
from loading import load_model

FILES = {"model.pth": None, "model_int8.pth": "int8", "model_int4.g32.pth": "int4"}


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    """Holds all FILES."""
    copy = tmp_path_factory.mktemp("files") / "qwen3"
    shutil.copytree(tiny_folder("qwen3"), copy)
    for mode in filter(None, FILES.values()):
        quantize.quantize_checkpoint(copy / "model.pth", mode, progress=False)
    return copy


@pytest.mark.parametrize("file", FILES)
def test_the_same_tensors_make_the_same_bytes(folder, tmp_path, file):
    shutil.copytree(folder, again := tmp_path / "elsewhere")
    for path in again.glob("*.pth"):
        path.unlink()
    convert(again, progress=False)
    if mode := FILES[file]:
        quantize.quantize_checkpoint(again / "model.pth", mode, progress=False)
    content = (again / file).read_bytes()
    assert content == (folder / file).read_bytes()
    for private in (socket.gethostname(), str(os.getpid()), "elsewhere", ".tmp"):
        assert f"{private}/".encode() not in content and f".{private}".encode() not in content


@pytest.mark.parametrize("file", FILES)
def test_checksums_are_those_of_a_zip_archive(folder, file):
    verify_checkpoint(folder / file)
    with zipfile.ZipFile(folder / file) as archive:
        assert archive.testzip() is None and all(record.CRC for record in archive.infolist() if record.file_size)
    if shutil.which("unzip"):
        assert subprocess.run(["unzip", "-tqq", folder / file], check=False).returncode == 0


@pytest.mark.parametrize("file", FILES)
def test_a_changed_byte_is_found_or_changes_nothing(folder, tmp_path, file):
    whole, rng = bytearray((folder / file).read_bytes()), random.Random(file)
    expected, path, found = read_checkpoint(folder / file), tmp_path / file, 0
    for at in rng.sample(range(len(whole)), 150) + rng.sample(range(3000), 50) + rng.sample(range(-3000, 0), 50):
        changed = whole.copy()
        changed[at] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            verify_checkpoint(path)
            state, quantization = read_checkpoint(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            found += 1
            continue
        assert quantization == expected[1] and state.keys() == expected[0].keys()
        assert all(torch.equal(tensor, expected[0][name]) for name, tensor in state.items())
    assert found > 150


def test_a_damaged_file_is_refused_on_request_and_by_quantize(folder, tmp_path):
    path = shutil.copytree(folder, tmp_path / "copy") / "model.pth"
    content = bytearray(path.read_bytes())
    at = content.index(read_checkpoint(path)[0]["layers.1.feed_forward.w2.weight"].numpy().tobytes()[:64])
    content[at] ^= 1
    path.write_bytes(content)
    load_model(path)
    for refuse in (lambda: load_model(path, verify=True), lambda: quantize.quantize_checkpoint(path, "int8")):
        with pytest.raises(UserError, match="model.pth is damaged: archive/data/.* does not match its checksum"):
            refuse()


def test_a_file_without_checksums(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    state = read_checkpoint(copy / "model.pth")[0]
    torch.serialization.set_crc32_options(False)
    try:
        write_checkpoint(copy / "model.pth", state, None)
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(copy / "model.pth") as archive:
        if all(record.CRC for record in archive.infolist() if record.file_size):
            pytest.skip("this PyTorch writes checksums all the same")
    with pytest.raises(UserError, match="has no checksums"):
        verify_checkpoint(copy / "model.pth")
    quantize.quantize_checkpoint(copy / "model.pth", "int8", progress=False)


# ---- hostile contents

NOT_TENSORS = {
    "an int": 3, "a bool": True, "a string": "x", "a list": [1.0], "None": None,
    "sparse": torch.ones(64).to_sparse(), "meta": torch.ones(64, device="meta"), "complex": torch.ones(64) * 1j,
    "quantized": torch.quantize_per_tensor(torch.ones(64), 0.1, 0, torch.qint8), "integers": torch.ones(64).long(),
    "bools": torch.ones(64) > 0, "fp64": torch.ones(64).double(), "fp8": torch.ones(64).to(torch.float8_e4m3fn),
    "another shape": torch.ones(1, 64), "shorter": torch.ones(63)}


@pytest.mark.parametrize("file, name", [("model.pth", "norm.weight"), ("model_int8.pth", "norm.weight"),
                                        ("model_int8.pth", "layers.0.attention.wo.scales"),
                                        ("model_int4.g32.pth", "layers.0.attention.wo.zeros")])
@pytest.mark.parametrize("kind", NOT_TENSORS)
def test_what_is_no_such_tensor(folder, tmp_path, file, name, kind):
    path = shutil.copytree(folder, tmp_path / "copy") / file
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"][name] = NOT_TENSORS[kind]
    if isinstance(NOT_TENSORS[kind], torch.Tensor) and name != "norm.weight" and kind not in ("sparse", "quantized"):
        checkpoint["state_dict"][name] = NOT_TENSORS[kind].expand(checkpoint["state_dict"][name].shape[0], -1)
    torch.save(checkpoint, path)
    refusals = [lambda: load_model(path), lambda: quantize.quantize_checkpoint(path, "int8")]
    for refuse in refusals if file == "model.pth" else refusals[:1]:
        with pytest.raises(UserError, match=rf"{file}( does not fit .*: {name}$| is not a checkpoint)"):
            refuse()


@pytest.mark.parametrize("checkpoint", [
    None, [], {}, 3, {"version": 1}, {"version": 1, "quantization": None, "state_dict": None},
    {"version": 1, "quantization": None, "state_dict": [1]}, {"version": 1, "quantization": None, "state_dict": {1: 2}},
    {"version": "1", "quantization": None, "state_dict": {}}, {"version": [1], "quantization": None, "state_dict": {}},
    *({"version": 1, "quantization": {"mode": "int8", **change}, "state_dict": {}} for change in (
        {"skipped": None}, {"skipped": [1]}, {"groupsize": "32"}, {"groupsize": 32.0}, {"groupsize": True},
        {"mode": []}, {"mode": None}, {"lm_head": {}}, {"reordered": 1}, {"reordered": "output"}, {3: 4}))])
def test_what_is_no_checkpoint(folder, tmp_path, checkpoint):
    path = shutil.copytree(folder, tmp_path / "copy") / "model.pth"
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match="model.pth"):
        load_model(path)


def test_pipes_and_devices_are_refused_before_they_are_read(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.pth").unlink()
    os.mkfifo(copy / "model.pth")
    with pytest.raises(UserError, match="model.pth is not a regular file"):
        load_model(copy / "model.pth")
    (copy / "model.pth").unlink()
    (copy / "model.safetensors").unlink()
    os.mkfifo(copy / "model.safetensors")
    with pytest.raises(UserError, match="model.safetensors: not a regular file"):
        load_model(copy)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json",
                                  "model.safetensors.index.json"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["fifo", "device"])
def test_pipes_and_devices_are_no_json(folder, tmp_path, file, make):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.pth").unlink()
    (copy / file).unlink(missing_ok=True)
    make(copy / file)
    with pytest.raises(UserError, match=f"{file}: not a regular file"):
        load_model(copy)


# ---- NaN and infinity

@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite(value, dtype):
    weight = torch.randn(700, 3000).to(dtype)
    check_finite("w", weight)
    check_finite("w", torch.full((3000, 700), torch.finfo(dtype).max, dtype=dtype))      # their sum overflows
    for at in (0, 1_049_999, 2_099_999):
        changed = weight.clone()
        changed.view(-1)[at] = value
        with pytest.raises(UserError, match="w holds NaN or infinity"):
            check_finite("w", changed)


SOURCES = {"model.norm.weight": "norm.weight",
           "model.layers.1.self_attn.k_proj.weight": "layers.1.attention.wqkv.weight",
           "model.layers.0.self_attn.q_norm.weight": "layers.0.attention.q_norm.weight",
           "model.embed_tokens.weight": "tok_embeddings.weight", "lm_head.weight": "output.weight"}


@pytest.mark.parametrize("source", SOURCES)
def test_nan_is_found_when_converting_quantizing_and_loading(folder, tmp_path, source):
    copy, named = shutil.copytree(folder, tmp_path / "copy"), f"{SOURCES[source]} holds NaN"
    weights, state = load_file(copy / "model.safetensors"), read_checkpoint(copy / "model.pth")[0]
    for tensors, name in ((weights, source), (state, SOURCES[source])):
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[-1] = float("nan")
    write_checkpoint(copy / "damaged.pth", state, None)
    for refuse in (lambda: load_model(copy / "damaged.pth"),
                   lambda: quantize.quantize_checkpoint(copy / "damaged.pth", "int8", progress=False)):
        with pytest.raises(UserError, match=named):
            refuse()
    save_file(weights, copy / "model.safetensors")
    before = (copy / "model.pth").read_bytes()
    with pytest.raises(UserError, match=named):
        convert(copy, progress=False)
    assert (copy / "model.pth").read_bytes() == before and not list(copy.glob(".*"))


def test_nan_in_a_quantized_file_is_found(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    for file, name in (("model_int8.pth", "layers.0.attention.wo.scales"), ("model_int4.g32.pth", "ffn_norm.weight"),
                       ("model_int4.g32.pth", "layers.2.feed_forward.w2.scales")):
        state, quantization = read_checkpoint(copy / file)
        name = next(key for key in state if key.endswith(name))
        write_checkpoint(copy / "nan.pth", {**state, name: torch.full_like(state[name], float("nan"))}, quantization)
        with pytest.raises(UserError, match=f"{name} holds NaN"):
            load_model(copy / "nan.pth")
