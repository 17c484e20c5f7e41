"""A base model that processes share out computes as a whole one; what a launcher asks for, and what it holds."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor

import engine_shards
from conftest import refusal, small_base
from engine_passes import PLAIN, Kernels
from engine_runner import StepRunner
from engine_shards import FSDP, ShardEngine, find_engine, is_sharded, quantizing_on, shard
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


# ---- What a launcher asks for ----------------------------------------------------------------------------------------
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2"}
REFUSED = [
    (FSDP2 | {"FSDP_AUTO_WRAP_POLICY": "MINE"}, "configuration does not serve (Invalid auto wrap policy: MINE."),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for Megatron-LM, expected FSDP2"),
    ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "asks for a parallelism_config"),
]


@pytest.fixture
def launcher(monkeypatch):
    """launcher(environment): what a launcher has written into it, and nothing else."""

    def launcher(environment):
        for name in [*engine_shards.os.environ]:
            if name.startswith(("ACCELERATE_", "FSDP_")):
                monkeypatch.delenv(name)
        # also what find_engine sets and takes out, so that it is restored
        untouched = dict.fromkeys(engine_shards.DECIDED_HERE, "no")
        untouched |= {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "false"}
        for name, value in (untouched | {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"} | environment).items():
            monkeypatch.setenv(name, value)

    return launcher


@pytest.mark.parametrize(("environment", "words"), REFUSED)
def test_what_a_launcher_asks_for_in_vain_is_one_line_with_its_remedy(environment, words, launcher):
    launcher(environment)
    assert words in refusal(find_engine, torch.float32)


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        ({"stage": 2}, "ZeRO in stage 2, expected stage 3"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "NVMe"),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, ""),
    ],
)
def test_of_deepspeed_only_the_third_stage_in_the_memory_of_gpu_or_host_serves(zero, words):
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": zero})
    if words:
        assert words in refusal(engine_shards.check_zero, plugin)
    else:
        engine_shards.check_zero(plugin)


@pytest.mark.parametrize("policy", ["NO_WRAP", "SIZE_BASED_WRAP"])
def test_decoder_layers_are_wrapped_whatever_a_launcher_says(policy, launcher, capsys):
    launcher(FSDP2 | {"FSDP_AUTO_WRAP_POLICY": policy, "FSDP_MIN_NUM_PARAMS": "1000000"})
    plugin = find_engine(torch.float32).plugin
    plugin.set_auto_wrap_policy(torch.nn.Linear(1, 1))
    assert plugin.auto_wrap_policy.func is transformer_auto_wrap_policy
    assert ("asks for SIZE_BASED_WRAP, which is not used" in capsys.readouterr().err) == (policy == "SIZE_BASED_WRAP")


@pytest.mark.parametrize("prefix", ["", "stage3_"])  # DeepSpeed knows both names, and refuses them together
def test_what_a_user_lets_deepspeed_keep_is_kept(prefix):
    base = torch.nn.Linear(3, 4, bias=False)
    options = {f"{prefix}max_live_parameters": 5}
    engine_shards.limit_gathered(options, base)
    assert options == {f"{prefix}max_live_parameters": 5, "stage3_max_reuse_distance": 12}


def test_options_that_deepspeed_refuses_are_one_line():
    pydantic = pytest.importorskip("pydantic")  # which comes with DeepSpeed

    class Options(pydantic.BaseModel, extra="forbid"):
        stage: int = 0

    engine_shards.check_options(Options, {"stage": 3})
    assert "(stage: Input should be a valid integer" in refusal(engine_shards.check_options, Options, {"stage": {}})
    assert "(stagee: Extra inputs" in refusal(engine_shards.check_options, Options, {"stagee": 3})

    def refuse(**options):  # as DeepSpeed does it
        assert not options, "Cannot provide deprecated parameter"

    assert "(Cannot provide deprecated" in refusal(engine_shards.check_options, refuse, {"stage": 3})


def test_what_a_launcher_and_the_settings_both_decide_the_settings_do_and_say_so(launcher, capsys):
    asked = {"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    launcher(FSDP2 | asked)
    assert find_engine(torch.float32).processes == 2
    assert capsys.readouterr().err == (
        "accelerate launch asks for mixed_precision fp16, gradient_accumulation_steps 4, which is not used: here"
        " USE_FP16, GRADIENT_ACCUMULATION_STEPS in config.py decides\n"
    )
    assert "ACCELERATE_MIXED_PRECISION" not in engine_shards.os.environ
    launcher({"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"})
    assert find_engine(torch.bfloat16) is None
    assert capsys.readouterr().err == ""
