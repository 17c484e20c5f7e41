"""Base models from a Hub: downloaded, cached and used offline; each refusal in one line; the token is never written."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest

import hub_utils
from conftest import TINY_BASE
from fake_hub import COMMIT, NO_SERVER, TOKEN, environment, serve

REPO = "team/tiny"


@pytest.fixture(scope="module")
def hub():
    """A fake Hub that serves models/tiny-base as REPO."""
    with serve(models={REPO: {file.name: file.read_bytes() for file in Path(TINY_BASE).iterdir()}}) as server:
        yield server


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a small dataset."""
    folder = tmp_path_factory.mktemp("hub")
    rows = [{"instruction": f"Say {n}", "response": f"Here is number {n}."} for n in range(6)]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def run_with_hub(run, workplace):
    """run_with_hub(url, name, *arguments): run a script against a Hub; outputs go to folders of that name."""

    def run_script(url, name, script, *arguments, offline="0"):
        folders = ("--output_dir", workplace / name / "output", "--logs_dir", workplace / name / "logs")
        folders += ("--models_dir", workplace / "models")
        return run(script, *arguments, *folders, **environment(url, workplace, offline))

    return run_script


def train_flags(workplace, repo=REPO):
    data = ("--custom_dataset_path", workplace / "rows.json", "--validation_split", 0.2, "--sample_prompts", 0)
    return ("--base_model_name", repo, *data, "--max_steps", 2, "--use_4bit_quantization", "false")


@pytest.fixture(scope="module")
def trained(hub, run_with_hub, workplace):
    """The finished first run, which downloads its base model."""
    done = run_with_hub(hub.url, "first", "train.py", *train_flags(workplace))
    assert done.returncode == 0, done.stderr
    return done


def adapter_bytes(folder):
    return (folder / "output/lora-adapter/adapter_model.safetensors").read_bytes()


def test_a_model_of_the_hub_is_downloaded_into_models_dir_and_trained(trained, hub, workplace):
    assert f"Looking up {REPO}" in trained.stderr
    weights = workplace / "models/models--team--tiny/snapshots" / COMMIT / "model.safetensors"
    assert weights.read_bytes() == (Path(TINY_BASE) / "model.safetensors").read_bytes()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert not list((workplace / "home").rglob(name))
    config = json.loads((workplace / "first/output/lora-adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == REPO


@pytest.mark.parametrize("offline", ["1", "0"], ids=["HF_HUB_OFFLINE", "no server"])
def test_a_cached_model_trains_the_same_without_a_hub(offline, trained, hub, run_with_hub, workplace):
    asked = len(hub.requests)
    name = f"offline-{offline}"
    done = run_with_hub(NO_SERVER, name, "train.py", *train_flags(workplace), offline=offline)
    assert done.returncode == 0, done.stderr
    assert len(hub.requests) == asked
    assert adapter_bytes(workplace / name) == adapter_bytes(workplace / "first")


def test_the_token_reaches_the_hub_and_no_file(trained, hub, workplace):
    resolved = [authorization for path, authorization in hub.requests if f"{REPO}/resolve/" in path]
    assert resolved
    assert set(resolved) == {f"Bearer {TOKEN}"}
    written = [path for path in (workplace / "first").rglob("*") if path.is_file()]
    assert {"settings.json", "optimizer.pt", "README.md"} <= {path.name for path in written}
    assert any(path.name.startswith("events.out") for path in written)
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []
    assert TOKEN not in trained.stdout + trained.stderr


def test_weights_are_read_ahead_where_they_lie_here_and_fit_into_memory(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(hub_utils, "read_files", read.append)
    monkeypatch.setattr(hub_utils, "Thread", lambda target, args, **_: Mock(start=lambda: target(*args)))
    for name in ("model-1.safetensors", "model-2.safetensors", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(b"123")
    (tmp_path / "model-fp16.safetensors").write_bytes(b"123")  # the index does not name it
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("no/such/model", "not a name", "../nowhere", "models/tiny-base/config.json", ""):
        hub_utils.read_ahead(name, "models")
    assert read == []
    hub_utils.read_ahead(str(tmp_path), "models")
    assert read == [[tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors"]]
    monkeypatch.setattr(hub_utils.psutil, "virtual_memory", lambda: Mock(available=11))
    hub_utils.read_ahead(str(tmp_path), "models")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    hub_utils.read_ahead(str(tmp_path), "models")
    assert len(read) == 1


def test_a_file_that_goes_while_it_is_read_ahead_is_no_error(tmp_path):
    (tmp_path / "whole").write_bytes(b"x" * 20_000_000)
    hub_utils.read_files([tmp_path / "whole", tmp_path / "gone", tmp_path])
