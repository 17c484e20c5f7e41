"""Files that others made choose no kernel and no place; a proxy or an offline switch in the way is one line."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import MixtralConfig

import hub_utils
import model_utils
from conftest import PROJECT, TINY_BASE, small_run
from hub_utils import models_cache
from settings_utils import DEFAULTS, Settings, make_settings

SETTINGS = Settings(**DEFAULTS)._replace(lora_target_modules="q_proj,v_proj")
# what a base's config.json may say -> it is not obeyed
KERNELS = {
    "a kernel of the Hub": {"attn_implementation": "someone/flash-kernel"},
    "flash attention that is not installed": {"attn_implementation": "flash_attention_2"},
    "a slow one": {"attn_implementation": "eager"},
    "one a sub-config": {"attn_implementation": {"": "someone/flash-kernel"}},
    "the internal name": {"_attn_implementation": "someone/flash-kernel"},
    "experts": {"experts_implementation": "someone/experts"},
}


@pytest.mark.parametrize("choice", KERNELS)
def test_a_base_cannot_choose_a_kernel(choice, tmp_path):
    shutil.copytree(TINY_BASE, tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | KERNELS[choice]))
    model = model_utils.load_base_model(str(tmp_path / "base"), torch.device("cpu"), torch.float32)
    shapes = model_utils.empty_model(str(tmp_path / "base"), SETTINGS)
    for found in (model.config, shapes.get_base_model().config):
        assert found._attn_implementation == "sdpa"
        assert found._experts_implementation in (None, "eager", "grouped_mm")


def test_a_mixture_of_experts_cannot_choose_a_kernel_either(tmp_path):
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    MixtralConfig(**shape, num_key_value_heads=2, vocab_size=100).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | KERNELS["experts"] | KERNELS["a kernel of the Hub"]))
    found = model_utils.empty_model(str(tmp_path), SETTINGS._replace(lora_dropout=0.0)).get_base_model().config
    assert found._attn_implementation == "sdpa"
    assert "someone" not in str(found._experts_implementation)


@pytest.mark.parametrize("name", ["models_dir", "output_dir", "logs_dir", "custom_dataset_path", "run_name"])
def test_an_adapters_settings_choose_no_place(name):
    recorded = {"base_model_name": "some/model", name: "/elsewhere"}
    assert getattr(make_settings({}, recorded), name) == DEFAULTS[name]


def test_an_adapters_settings_of_a_wrong_type_are_one_line(run, undisturbed, tmp_path):
    adapter = Path(shutil.copytree(undisturbed() / "lora-adapter", tmp_path / "adapter"))
    settings = json.loads((adapter / "settings.json").read_text())
    (adapter / "settings.json").write_text(json.dumps(settings | {"max_seq_length": "long"}))
    done = run("inference.py", "Hi", "--adapter_path", adapter)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "error: the adapter's settings.json: max_seq_length is 'long', expected a whole number"
    )


# ---- The Hub's environment -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_the_libraries_cache_is_used_where_the_user_has_set_it_and_models_dir_was_left(variable, monkeypatch, tmp_path):
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    assert models_cache("models", "team/tiny") == PROJECT / "models"
    monkeypatch.setenv(variable, str(tmp_path))
    assert models_cache("models", "team/tiny") == Path(huggingface_hub.constants.HF_HUB_CACHE)
    assert models_cache(str(tmp_path / "mine"), "team/tiny") == tmp_path / "mine"


def test_a_model_that_was_downloaded_to_models_before_is_used_from_there(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(hub_utils, "resolve_path", lambda path: tmp_path / path)
    snapshot = tmp_path / "models/models--team--tiny/snapshots/0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert models_cache("models", "team/tiny") == tmp_path / "models"
    assert models_cache("models", "team/other") == Path(huggingface_hub.constants.HF_HUB_CACHE)


PROXIES = {"socks5://127.0.0.1:9": "SOCKS", "foo://127.0.0.1:9": "proxy"}


@pytest.mark.parametrize("proxy", PROXIES)
@pytest.mark.parametrize("flag", ["--base_model_name", "--custom_dataset_path"])
def test_a_proxy_that_cannot_be_used_is_one_line(proxy, flag, run, tmp_path):
    folders = ("--output_dir", tmp_path / "out", "--logs_dir", tmp_path / "logs", "--models_dir", tmp_path / "models")
    done = run("train.py", "--dry_run", flag, "team/unseen", *folders, ALL_PROXY=proxy, HF_HUB_OFFLINE="0")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: the Hub cannot be reached for team/unseen through the proxy that ALL_PROXY")
    assert "unset it" in line


def test_transformers_offline_is_obeyed_and_named(run, tmp_path):
    folders = ("--output_dir", tmp_path / "out", "--logs_dir", tmp_path / "logs", "--models_dir", tmp_path / "models")
    offline = {"TRANSFORMERS_OFFLINE": "1", "HF_HUB_OFFLINE": ""}
    done = run("train.py", "--dry_run", "--base_model_name", "team/unseen", *folders, **offline)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert (
        line
        == "error: team/unseen is not in the cache and TRANSFORMERS_OFFLINE is set; unset it or give a local folder"
    )


def test_what_a_run_reads_is_never_moved(dataset, tmp_path, undisturbed):
    """A base that lies in the output folder, where a merged model would."""
    out = tmp_path / "out"
    shutil.copytree(TINY_BASE, out / "merged-model")
    before = {path.name: path.read_bytes() for path in (out / "merged-model").iterdir()}
    small_run(dataset, tmp_path, base_model_name=str(out / "merged-model"))
    small_run(dataset, tmp_path, base_model_name=str(out / "merged-model"), seed=7)
    assert {path.name: path.read_bytes() for path in (out / "merged-model").iterdir()} == before
    assert len(list((out / "previous").iterdir())) == 1
