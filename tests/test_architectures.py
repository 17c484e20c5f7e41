"""Each architecture of benchmarks/architectures.py trains exactly, is saved, loaded, scored, generates and merges."""

import pytest
import torch

from benchmarks.architectures import ARCHITECTURES, try_architecture

# these let a row read the one before it: recurrent and convolutional layers, ALiBi, OPT's learned positions, positions
# scaled by the longest row, and masks that transformers makes without the position ids (gpt-oss, Falcon)
ONE_ROW_A_PASS = {
    "llama, rope dynamic",
    "llama, rope longrope",
    "gpt_oss",
    "opt",
    "bloom",
    "falcon",
    "mpt",
    "lfm2",
    "recurrent_gemma",
    "mamba",
    "mamba2",
    "falcon_mamba",
    "jamba",
    "bamba",
    "granitemoehybrid",
    "falcon_h1",
    "qwen3_next",
    "rwkv",
}
LEFT_OUT = {
    "gemma3 (multimodal)": ["model.vision_tower"],
    "phimoe": ["mlp.router", "mlp.experts.gate_up_proj"],
    "llama4_text": ["feed_forward.router", "feed_forward.experts.gate_up_proj"],
    "gpt_oss": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "granitemoe": ["block_sparse_moe.experts.gate_up_proj"],
    "deepseek_v3": ["mlp.gate_proj", "mlp.shared_experts.down_proj"],
    "qwen3_moe": [],
    "mamba": ["mixer.out_proj", "mixer.dt_proj"],
    "falcon_h1": ["mamba.out_proj"],
    "llama": [],
    "mistral": [],
    "qwen3": [],
    "gemma2": [],
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are too small to share out among cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_trains_as_single_rows_do_and_ends_as_a_merged_model(name, tmp_path):
    found = try_architecture(name, tmp_path)
    assert found.problem == ""
    assert found.rows == ("one a pass" if name in ONE_ROW_A_PASS else "end to end")
    assert found.layers > 0
    assert found.idle == 0
    assert found.gradient < 1e-5
    assert found.scores < 1e-5
    assert found.merged < 1e-4
    if name in LEFT_OUT:
        assert all(part in found.left_out for part in LEFT_OUT[name])
        assert bool(found.left_out) == bool(LEFT_OUT[name])


def test_the_table_has_at_least_25_architectures():
    assert len(ARCHITECTURES) >= 25
