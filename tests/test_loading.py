"""loading.py: what a user may name as a checkpoint, with a Hub that is not there, and the scripts that download."""
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import huggingface_hub
import huggingface_hub.errors as hub_errors
import pytest
import torch

import cli
import loading
import tiny
from cli import UserError
from loading import download_checkpoint, load_model, parse_device, parse_dtype, resolve_checkpoint, wanted_files

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = ["config.json", "generation_config.json", "model-00001-of-00002.safetensors",
              "model-00002-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
              "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt",
              "chat_template.jinja", "special_tokens_map.json"]
EXTRAS = ["README.md", ".gitattributes", "modeling_qwen.py", "pytorch_model.bin", "pytorch_model.bin.index.json",
          "consolidated.safetensors", "original/consolidated.00.pth", "training_args.bin", "tf_model.h5",
          "onnx/model.onnx"]


def test_wanted_files():
    assert set(wanted_files(REPOSITORY + EXTRAS)) == set(REPOSITORY)
    old = ["config.json", "qwen.tiktoken", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin",
           "pytorch_model.bin.index.json"]
    assert set(wanted_files(old + ["tokenization_qwen.py", "qwen_generation_utils.py", "optimizer.bin"])) == set(old)
    assert wanted_files(["config.json", "model.gguf"]) == []


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A Hugging Face checkpoint as it lies on the Hub."""
    return tiny.save(tiny.reference("qwen3-tied"), tmp_path_factory.mktemp("published"))


@pytest.fixture
def hub(monkeypatch, tmp_path) -> SimpleNamespace:
    """A Hub that holds `files`, empty or from `folder`. asked: the snapshots asked for; fail_...: what calls raise."""
    hub = SimpleNamespace(files=REPOSITORY + EXTRAS, folder=None, come=99, fail_info=None, fail_download=None, asked=[])

    def model_info(self, repo_id: str, revision: str | None = None) -> SimpleNamespace:
        if hub.fail_info:
            raise hub.fail_info
        return SimpleNamespace(sha="0123abcd", siblings=[SimpleNamespace(rfilename=file) for file in hub.files])

    def snapshot_download(repo_id: str, local_dir: Path, allow_patterns: list[str], **options) -> str:
        if hub.fail_download:
            raise hub.fail_download
        hub.asked.append((repo_id, local_dir, allow_patterns, options))
        local_dir.mkdir(parents=True, exist_ok=True)
        for file in allow_patterns[:hub.come]:
            (local_dir / file).touch()
            if hub.folder:
                shutil.copy(hub.folder / file, local_dir)
        return str(local_dir)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(loading, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    return hub


@pytest.fixture
def full_hub(hub, published) -> SimpleNamespace:
    hub.files, hub.folder = [file.name for file in published.iterdir()], published
    return hub


def test_download(hub, tmp_path):
    assert download_checkpoint("Qwen/Qwen3-0.6B", tmp_path, "secret") == tmp_path / "Qwen/Qwen3-0.6B"
    assert {name for _, _, names, _ in hub.asked for name in names} == set(REPOSITORY)
    assert hub.asked[-1][2] == ["config.json"]           # whose presence says that all is there
    for repo_id, folder, _, options in hub.asked:
        assert (repo_id, folder) == ("Qwen/Qwen3-0.6B", tmp_path / "Qwen/Qwen3-0.6B")
        assert options == {"token": "secret", "revision": "0123abcd"}


def answer(kind: type) -> Exception:
    """A Hub error without its usual HTTP response, whose class depends on huggingface_hub's version."""
    return kind.__new__(kind, "the server said so")


@pytest.mark.parametrize("kind, message", [
    (hub_errors.GatedRepoError, "a/b is gated: .*HF_TOKEN"),
    (hub_errors.RepositoryNotFoundError, "a/b: no such repository or a private one"),
    (hub_errors.HfHubHTTPError, "could not download a/b: .*prepare.sh a/b"),
    (hub_errors.OfflineModeIsEnabled, "could not download a/b: .*prepare.sh a/b"),
    (hub_errors.HTTPError, "could not download a/b: .*prepare.sh a/b"),
    (OSError, "could not download a/b: .*copy the checkpoint's files to .*a/b"),
])
@pytest.mark.parametrize("call", ["fail_info", "fail_download"])
def test_download_errors(hub, tmp_path, call, kind, message):
    setattr(hub, call, answer(kind))
    with pytest.raises(UserError, match=message) as error:
        download_checkpoint("a/b", tmp_path)
    assert "\n" not in str(error.value)


def test_download_mistakes(hub, tmp_path):
    hub.files = ["model.gguf", "README.md"]
    with pytest.raises(UserError, match=r"a/b: no config.json with \*.safetensors"):
        download_checkpoint("a/b", tmp_path)
    hub.fail_info = answer(hub_errors.RevisionNotFoundError)
    with pytest.raises(UserError, match="revision v9: a/b has no such revision"):
        download_checkpoint("a/b", tmp_path, revision="v9")
    hub.fail_info = answer(hub_errors.HFValidationError)
    with pytest.raises(UserError, match="'a--b/c' is not a Hub id"):
        download_checkpoint("a--b/c", tmp_path)


def test_partial_download(hub, tmp_path):
    hub.come = 3
    with pytest.raises(UserError, match="could not download all of a/b: .*safetensors.* missing"):
        download_checkpoint("a/b", tmp_path)
    assert not (tmp_path / "a/b/config.json").exists()   # or it would pass for a whole one


# ---- ModelScope

@pytest.fixture
def modelscope(monkeypatch) -> SimpleNamespace:
    """Its library, which holds the same repository. fail: what it raises."""
    scope = SimpleNamespace(fail=None, asked=[], logins=[])

    class HubApi:
        def login(self, token: str) -> None:
            scope.logins.append(token)

        def get_model_files(self, model_id: str, revision: str = "master", recursive: bool = False) -> list[dict]:
            if scope.fail:
                raise scope.fail
            scope.asked.append((model_id, revision, recursive))
            return [{"Path": "onnx", "Type": "tree"}, *({"Path": file, "Type": "blob"} for file in REPOSITORY + EXTRAS)]

    def snapshot_download(model_id: str, revision: str | None = None, local_dir: str | None = None,
                          allow_patterns: list[str] | None = None) -> str:
        scope.asked.append((model_id, revision, allow_patterns))
        Path(local_dir).mkdir(parents=True, exist_ok=True)
        for file in allow_patterns:
            (Path(local_dir) / file).touch()
        return local_dir
    package, hub, api = ModuleType("modelscope"), ModuleType("modelscope.hub"), ModuleType("modelscope.hub.api")
    package.snapshot_download, package.hub, hub.api, api.HubApi = snapshot_download, hub, api, HubApi
    for module in (package, hub, api):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return scope


def test_download_from_modelscope(modelscope, tmp_path):
    folder = download_checkpoint("Qwen/Qwen3-0.6B", tmp_path, hub="modelscope")
    assert folder == tmp_path / "Qwen/Qwen3-0.6B" and {file.name for file in folder.iterdir()} == set(REPOSITORY)
    listed, first, last = modelscope.asked
    assert listed == ("Qwen/Qwen3-0.6B", "master", True) and last == ("Qwen/Qwen3-0.6B", None, ["config.json"])
    assert "config.json" not in first[2] and not modelscope.logins
    download_checkpoint("a/b", tmp_path, "secret", "v1", "modelscope")
    assert modelscope.asked[3] == ("a/b", "v1", True) and modelscope.logins == ["secret"]
    assert all(revision == "v1" for _, revision, _ in modelscope.asked[3:])


@pytest.mark.parametrize("error", [ValueError("no such model\nat all"), OSError("no route"), KeyError()])
def test_modelscope_errors(modelscope, tmp_path, error):
    modelscope.fail = error
    with pytest.raises(UserError, match="could not download a/b from ModelScope: .*Run this again, or copy") as refused:
        download_checkpoint("a/b", tmp_path, hub="modelscope")
    assert "\n" not in str(refused.value)


def test_without_modelscopes_library(monkeypatch, tmp_path, refusal):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr(sys, "argv", ["download.py", "a/b", "--hub", "modelscope", "--out", str(tmp_path)])
    import download
    assert refusal(lambda _: download.main()) == "error: --hub modelscope needs its library: pip install modelscope\n"
    monkeypatch.setattr(sys, "argv", ["download.py", "a/b", "--hub", "gitee"])
    assert "--hub: invalid choice: 'gitee'" in refusal(lambda _: download.main())


# ---- resolve_checkpoint

def test_local_paths(hub, published, tmp_path):
    for name in ("model.pth", "model_int8.pth"):
        (tmp_path / name).touch()
        assert resolve_checkpoint(tmp_path / name) == resolve_checkpoint(str(tmp_path / name)) == tmp_path / name
    assert resolve_checkpoint(tmp_path) == tmp_path / "model.pth"
    (tmp_path / "Qwen").mkdir()
    (tmp_path / "Qwen" / "here").touch()
    assert resolve_checkpoint("Qwen/here") == Path("Qwen/here")          # what exists comes first
    for path in ("absent.pth", "Qwen/model.pth", "Qwen/absent", "a/b/c", "/a/b", "../b", "./b", tmp_path / "absent"):
        with pytest.raises(UserError, match="no such file; .*a Hub id such as .*prepare.sh") as error:
            resolve_checkpoint(path, download=True)
        assert error.value.field == "checkpoint_path"
    with pytest.raises(UserError, match="^draft_checkpoint_path .*no such file"):
        resolve_checkpoint("absent.pth", "draft_checkpoint_path")
    assert not hub.asked


def test_folder_with_a_hugging_face_checkpoint_is_converted(hub, published, tmp_path, capsys):
    folder = shutil.copytree(published, tmp_path / "copy")
    with pytest.raises(UserError, match="no such file"):
        resolve_checkpoint(folder)
    model, _ = load_model(folder)
    assert "model.pth is missing: converting" in capsys.readouterr().err and model.args.qk_norm
    made = (folder / "model.pth").stat().st_mtime_ns
    assert resolve_checkpoint(folder, download=True).stat().st_mtime_ns == made and not hub.asked


def test_hub_id_is_downloaded_and_converted_once(full_hub, tmp_path, capsys):
    path = tmp_path / "checkpoints" / "Qwen" / "Qwen3-0.6B" / "model.pth"
    with pytest.raises(UserError, match=f"{path}: no such file"):
        resolve_checkpoint("Qwen/Qwen3-0.6B")
    model, tokenizer = load_model("Qwen/Qwen3-0.6B", dtype=torch.float32)
    err = capsys.readouterr().err
    assert f"Qwen/Qwen3-0.6B: downloading from the Hugging Face Hub to {path.parent}" in err and "Converting" in err
    assert path.exists() and len(full_hub.asked) == 2 and model.args.qk_norm and tokenizer.vocab_size == 257
    again, _ = load_model(Path("Qwen/Qwen3-0.6B"), dtype=torch.float32)
    assert torch.equal(again.layers[0].attention.wo.weight, model.layers[0].attention.wo.weight)
    assert len(full_hub.asked) == 2 and capsys.readouterr().err == ""
    assert resolve_checkpoint("Qwen/Qwen3-0.6B") == path


def test_hub_id_offline(full_hub, published, tmp_path):
    folder = tmp_path / "checkpoints" / "Qwen" / "Qwen3-0.6B"
    full_hub.fail_info = OSError("no route to host\nat all")
    with pytest.raises(UserError) as error:
        load_model("Qwen/Qwen3-0.6B")
    assert str(error.value) == (
        "could not download Qwen/Qwen3-0.6B: no route to host; run scripts/prepare.sh Qwen/Qwen3-0.6B where there is a "
        f"network (it resumes), or copy the checkpoint's files to {folder}")
    shutil.copytree(published, folder)                   # as the message says
    load_model("Qwen/Qwen3-0.6B")
    assert (folder / "model.pth").exists()


def test_each_machines_first_rank_downloads_for_the_others(full_hub):
    """load_model in the second of two processes waits in its first gather until the first one has what it needs."""
    order = []

    def ranks(local_rank: int, gather) -> SimpleNamespace:
        return SimpleNamespace(rank=local_rank, local_rank=local_rank, world_size=2, local_world_size=2, gather=gather,
                               check_same=lambda *_: None)

    def first_rank(_: None) -> None:
        order.append("second waits")
        load_model("Qwen/Qwen3-0.6B", ranks=ranks(0, lambda _: order.append("first is done")), may_replicate=True)
    load_model("Qwen/Qwen3-0.6B", ranks=ranks(1, first_rank), may_replicate=True)
    assert order == ["second waits", "first is done"] and len(full_hub.asked) == 2


# ---- devices, dtypes, commands

def test_devices_and_dtypes(monkeypatch):
    cpu = parse_device("cpu")
    assert (parse_dtype(None, cpu), parse_dtype("bf16", cpu)) == (None, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for call, message in ((lambda: parse_device("gpu"), "device 'gpu' is not a device"),
                          (lambda: parse_device("meta"), "device 'meta' is not supported"),
                          (lambda: parse_device("cuda"), "device cuda: this PyTorch .* sees no CUDA device"),
                          (lambda: parse_dtype("fp16", cpu), "dtype fp16 is not for CPUs")):
        with pytest.raises(UserError, match=f"^{message}"):
            call()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parse_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="^device cuda:2: there are 2 CUDA devices"):
        parse_device("cuda:2")


def test_the_flag_of_a_command_is_named(hub, capsys):
    def main() -> None:
        with cli.fields(checkpoint_path="draft_checkpoint_path"):
            load_model("absent.pth")
    with pytest.raises(SystemExit):
        cli.run(main)
    assert capsys.readouterr().err.startswith("error: --draft_checkpoint_path absent.pth: no such file")


@pytest.mark.slow
def test_nobody_answers():
    """Without a network prepare.sh ends with the download's one line and goes no further."""
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1", "PYTHON": sys.executable}
    done = subprocess.run([ROOT / "scripts/prepare.sh", "nobody/nothing"], capture_output=True, text=True, timeout=200,
                          cwd="/", env=env)
    assert done.returncode == 2 and done.stderr.startswith("error: could not download nobody/nothing: ")
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("argv", [[], ["a/b", "c/d"], ["a/b", "--token", "x"], ["a/b", "--hub"]])
def test_prepare_usage(argv):
    done = subprocess.run([ROOT / "scripts/prepare.sh", *argv], capture_output=True, text=True)
    assert done.returncode == 2 and "usage" in done.stderr
