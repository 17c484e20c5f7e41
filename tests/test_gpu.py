"""What only a CUDA GPU can show. Skipped, with the reason, where there is none."""

import json
import os

import pytest
import torch

from conftest import PROJECT, TINY_BASE
from model_utils import attach_lora, build_quantization_config, choose_dtype, load_base_model, resolve_device
from pass_utils import score_rows
from run_utils import DEFAULTS, Settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"),
]


def four_bit_model():
    device = resolve_device("cuda")
    settings = Settings(**DEFAULTS)
    dtype = choose_dtype(device, True)
    return attach_lora(
        load_base_model(TINY_BASE, device, dtype, build_quantization_config(settings, dtype)),
        settings._replace(base_model_name=TINY_BASE),
    )


def test_the_default_settings_train_in_four_bits_and_merge(run, tmp_path):
    rows = [{"instruction": f"Count to {n}", "response": " ".join(map(str, range(1, n + 1)))} for n in range(2, 42)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    where = ("--output_dir", tmp_path / "out", "--logs_dir", tmp_path / "logs")
    data = ("--custom_dataset_path", tmp_path / "rows.json", "--max_new_tokens", 8)
    base = ("--base_model_name", TINY_BASE)
    done = run("train.py", *base, *data, *where, "--max_steps", 6, CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 0, done.stderr
    assert "4-bit NF4, bfloat16 on CUDA" in done.stderr
    assert "demo settings" not in done.stderr
    record = json.loads((tmp_path / "out/lora-adapter/run.json").read_text())
    assert record["last_loss"] < record["first_loss"]
    code = (
        "from model_utils import load_trained_model, merge_and_save_model\n"
        f"model, tokenizer = load_trained_model({str(tmp_path / 'out/lora-adapter')!r})\n"
        f"merge_and_save_model(model, tokenizer, {str(tmp_path / 'merged')!r})\n"
    )
    (tmp_path / "merge.py").write_text(code)
    merged = run(
        tmp_path / "merge.py",
        cwd=tmp_path,
        CUDA_VISIBLE_DEVICES="0",
        PYTHONPATH=f"{PROJECT}:{os.environ.get('PYTHONPATH', '')}",
    )
    assert merged.returncode == 0, merged.stderr
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"


def test_only_the_lora_weights_are_float32_in_a_four_bit_model():
    model = four_bit_model()
    float32 = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert float32 == {name for name, p in model.named_parameters() if p.requires_grad}


def test_rows_laid_end_to_end_do_not_read_each_other_on_the_gpu():
    model = four_bit_model()
    ids = [1, *torch.randint(20, 7000, (60,), generator=torch.Generator().manual_seed(0)).tolist()]
    row = {"input_ids": ids, "labels": ids}
    alone = score_rows(model, [row], 4096)[0][0]
    second = score_rows(model, [row, row], 4096)[1][0]
    # the same tokens in one row: there the second half does read the first
    halves = {"input_ids": ids + ids, "labels": [-100] * len(ids) + [-100, *ids[1:]]}
    joined = score_rows(model, [halves], 4096)[0][0]
    assert second == pytest.approx(alone, rel=0.01)
    assert abs(joined - alone) > 0.05 * alone  # the check can tell
