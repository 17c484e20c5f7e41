"""A base model that processes share out computes as a whole one; what it holds is told beforehand."""

from functools import partial

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from conftest import small_base
from engine_passes import PLAIN, Kernels
from engine_runner import StepRunner
from engine_shards import FSDP, ShardEngine, is_sharded, quantizing_on, shard
from model_utils import CPU, build_quantization_config, empty_model, load_base_model
from plan_utils import NF4_BYTES, StepPlan, shard_bytes, weight_bytes
from settings_utils import DEFAULTS, Settings
from tiny import make_rows, with_adapter

SETTINGS = Settings(**DEFAULTS)._replace(lora_dropout=0.0, lora_target_modules="q_proj,down_proj")


@pytest.fixture
def alone(tmp_path):
    """A group of processes that this one is alone in."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kernels", [PLAIN, Kernels(loss=True, lora=True)], ids=["library", "fused"])
@pytest.mark.parametrize("four_bit", [False, True], ids=["float32", "4 bits"])
def test_a_base_in_shards_gives_the_losses_and_gradients_of_a_whole_one(alone, four_bit, kernels):
    settings, found = SETTINGS._replace(use_4bit_quantization=four_bit), []
    rows = make_rows(vocabulary=8000)
    for in_shards in (False, True):
        quantization = build_quantization_config(settings, torch.float32, sharded=in_shards)
        with quantizing_on(CPU):
            base = load_base_model(small_base(), CPU, torch.float32, quantization)
        attach = partial(with_adapter, settings=settings, std=0.05)
        if in_shards:
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP", reshard_after_forward=True
            )
            model = shard(base, ShardEngine(FSDP, 1, plugin), CPU, attach)
        else:
            model = attach(base)
        assert is_sharded(model) == in_shards
        assert all(isinstance(p, DTensor) == (in_shards and not p.requires_grad) for p in model.parameters())
        plan = StepPlan(kernels if in_shards else PLAIN, max_pass_tokens=1000, checkpointing=four_bit)
        with StepRunner(model, plan) as runner:
            assert runner.plan.kernels == plan.kernels
            for _ in range(2):  # the second finds what the first has left
                loss = runner.step(rows)
            found.append((loss, [p.grad.clone() for p in model.parameters() if p.requires_grad]))
    (expected, gradients), (loss, others) = found
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


def test_a_process_is_told_to_hold_its_part_of_the_weights_and_all_of_their_scales():
    shapes = empty_model(small_base(), SETTINGS)
    plain, four_bit = (SETTINGS._replace(use_4bit_quantization=used) for used in (False, True))
    whole, held, gathered = shard_bytes(shapes, plain, torch.bfloat16, 4)
    assert whole == weight_bytes(shapes, plain, torch.bfloat16)
    assert held == pytest.approx(whole / 4)
    assert 0 < gathered <= whole
    four_whole, four_held, _ = shard_bytes(shapes, four_bit, torch.bfloat16, 4)
    in_layers = (whole - four_whole) / (2 - NF4_BYTES)  # how many weights are quantized
    assert four_held == pytest.approx((four_whole + 3 * in_layers * (NF4_BYTES - 0.5)) / 4, rel=0.01)
