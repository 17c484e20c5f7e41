"""LoRA over frozen layers as one operation computes what bitsandbytes and peft do; here in plain PyTorch, on a CPU."""

import contextlib
import weakref

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, Qwen2Config, Starcoder2Config
from transformers.modeling_layers import GradientCheckpointingLayer

import engine_lora
from engine_lora import dequantize, frozen_tensors
from engine_passes import (
    Kernels,
    pass_losses,
    transformers_model,
)
from engine_runner import StepRunner
from plan_utils import StepPlan
from tiny import (
    CPU,
    assert_same,
    bundled_model,
    fast_lora,
    gradients,
    make_rows,
    plain_gradients,
    reference_gradients,
    some_rows,
    with_adapter,
)


def four_bit_layer(inputs=192, outputs=256, **options):
    layer = bnb.nn.Linear4bit(
        inputs, outputs, bias=False, **{"quant_type": "nf4", "compress_statistics": True} | options
    )
    return layer.to("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_weights_are_dequantized_to_bitsandbytes_bits(dtype):
    layer = four_bit_layer()
    state = layer.weight.quant_state
    state.dtype = dtype
    expected = bnb.functional.dequantize_4bit(layer.weight.data, state)
    found = dequantize(frozen_tensors(layer), torch.empty(256, 192, dtype=dtype))
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("options", [{"quant_type": "fp4"}, {"compress_statistics": False}])
def test_weights_quantized_in_another_way_are_left_to_bitsandbytes(options):
    assert frozen_tensors(four_bit_layer(**options)) is None


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_fused_lora_layers_have_pefts_losses_and_gradients(four_bit, checkpointing):
    model, rows = bundled_model(four_bit), some_rows()
    with torch.no_grad():
        expected_losses = pass_losses(model, rows)[0]
    expected = plain_gradients(model, rows)
    runner = StepRunner(model, StepPlan(Kernels(lora=True), checkpointing))
    assert runner.lora.covers_all
    layers = transformers_model(model).get_decoder().layers
    assert [len(group.layers) for group in runner.lora.groups] == [3, 1, 2, 1] * len(layers)
    losses = pass_losses(model, rows)[0]
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-5)
    losses.sum().backward()
    assert_same(gradients(model), expected, 3e-5)  # both are 5e-6 from float64's, since float32 rounds their sums apart


def test_layers_that_read_the_same_tensor_are_computed_together_and_others_alone():
    model, rows = bundled_model(lora_target_modules="q_proj,v_proj,up_proj,down_proj"), some_rows()
    layers = transformers_model(model).get_decoder().layers
    layers[0].self_attn.v_proj.scaling["default"] = 1.0
    expected = plain_gradients(model, rows)
    lora = fast_lora(model)
    assert [len(group.layers) for group in lora.groups] == [1, 1, 1, 1] + [2, 1, 1] * (len(layers) - 1)
    assert_same(plain_gradients(model, rows), expected, 3e-5)
    group, x = lora.groups[4], torch.randn(1, 7, 256)
    q, v = layers[1].self_attn.q_proj, layers[1].self_attn.v_proj
    together = q(x), v(x)
    assert group.waiting is None
    q(x)
    torch.testing.assert_close(v(2 * x), 2 * together[1])  # another tensor than the first of the group read
    assert group.waiting is None
    q(x)
    lora.forget()  # a pass broke off
    assert group.waiting is None


def test_the_fused_layers_add_their_biases():
    shape = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    base = AutoModelForCausalLM.from_config(Qwen2Config(**shape, num_attention_heads=4, num_key_value_heads=2))
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model, rows = with_adapter(base), make_rows((5, 17, 9))
    expected = plain_gradients(model, rows)
    lora = fast_lora(model)
    assert [len(group.biases) for group in lora.groups] == [3, 0, 0, 0] * 2
    assert_same(plain_gradients(model, rows), expected, 3e-5)


def test_layers_of_two_decoder_layers_are_computed_apart():
    class Block(GradientCheckpointingLayer):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([Block(), Block()])

        def forward(self, x):  # all four read the same tensor
            return sum(layer(x) for block in self.blocks for layer in (block.first, block.second))

    model = get_peft_model(Model(), LoraConfig(r=2, target_modules=["first", "second"]))
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    shared = engine_lora.share_inputs(model, layers, lambda: model(torch.randn(3, 8)))
    assert shared == [layers[:2], layers[2:]]


def test_weights_that_stay_dequantized_give_the_same_bits():
    model, rows = bundled_model(four_bit=True), some_rows()
    with StepRunner(model, StepPlan(Kernels(lora=True), max_pass_tokens=1000)) as runner:
        runner.step(rows)
        expected = gradients(model)
    runner = StepRunner(model, StepPlan(Kernels(lora=True), dequantized=True, max_pass_tokens=1000))
    for _ in range(2):
        runner.step(rows)
        assert all(torch.equal(gradients(model)[name], gradient) for name, gradient in expected.items())
        assert {len(group.frozen) for group in runner.lora.groups} == {1, 2, 3}
    dequantized = [weakref.ref(weight) for group in runner.lora.groups for weight in group.frozen]
    runner.lora.set_dequantized(False)
    assert all(group.frozen is group.stored for group in runner.lora.groups)
    assert not any(weight() is not None for weight in dequantized)


def test_a_base_with_dropout_of_its_own_is_recomputed_with_the_same_masks():
    shape = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}

    def gradient(checkpointing):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(Starcoder2Config(**shape, **heads, residual_dropout=0.3))
        model = with_adapter(base)
        runner = StepRunner(model, StepPlan(Kernels(lora=True), checkpointing, max_pass_tokens=1000))
        assert runner.lora.covers_all
        torch.manual_seed(1)
        runner.step(make_rows((5, 17, 9)))
        return gradients(model)

    expected, found = gradient(False), gradient(True)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


def test_compiled_layers_have_the_same_gradients():
    model, rows = bundled_model(), some_rows()
    expected = reference_gradients(model, rows)
    plan = StepPlan(Kernels(lora=True), checkpointing=True, compiled=True, max_pass_tokens=1000)
    runner = StepRunner(model, plan)
    runner.step(rows)
    assert runner.plan.compiled  # it did not fall back
    assert_same(gradients(model), expected, 1e-4)


def test_the_layers_multiply_with_the_adapter_as_the_optimizer_left_it():
    model, rows = bundled_model(), some_rows()
    lora = fast_lora(model)
    before = pass_losses(model, rows)[0].detach()
    with torch.no_grad():
        for weight in lora.weights:
            weight.mul_(2)
    torch.testing.assert_close(pass_losses(model, rows)[0].detach(), before)
    lora.refresh()
    after = pass_losses(model, rows)[0].detach()
    assert (after - before).abs().max() > 0.01
    model.eval()  # then peft's own way computes, which must agree
    torch.testing.assert_close(pass_losses(model, rows)[0].detach(), after, rtol=1e-4, atol=1e-4)


def test_disabled_and_merged_adapters_and_dora_take_pefts_own_way():
    model, rows = bundled_model(), some_rows()
    with model.disable_adapter():
        expected = pass_losses(model, rows)[0].detach()
    fast_lora(model)
    with model.disable_adapter():
        torch.testing.assert_close(pass_losses(model, rows)[0].detach(), expected)
    lora = fast_lora(bundled_model(use_dora=True))
    assert not lora.covers_all
    assert not len(lora.seeds)


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    x = torch.ones(200, 500)
    dropped = engine_lora.drop(x, torch.tensor([3]), 0.25)
    assert (dropped == 0).float().mean() == pytest.approx(0.25, abs=0.01)
    assert dropped.mean() == pytest.approx(1, abs=0.01)
    assert dropped.max() == pytest.approx(1 / 0.75)
    assert torch.equal(dropped, engine_lora.drop(x, torch.tensor([3]), 0.25))
    assert not torch.equal(dropped, engine_lora.drop(x, torch.tensor([4]), 0.25))


def test_the_gradient_goes_through_the_same_dropout_as_the_loss():
    torch.manual_seed(0)
    x, weight, seed = torch.randn(40, 64, requires_grad=True), torch.randn(32, 64), torch.tensor([7])
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    mask = engine_lora.drop(torch.ones(40, 64), seed, 0.3)
    expected = x @ weight.T + 2.0 * ((x * mask) @ a.T) @ b.T
    wanted = torch.autograd.grad(expected.pow(2).sum(), (x, a, b))
    (out,), _ = torch.ops.lora.linear(x, [a], [b], 2 * a.detach(), [b.detach()], [], seed, 0.3, 2.0, [weight])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
    for found, gradient in zip(torch.autograd.grad(out.pow(2).sum(), (x, a, b)), wanted, strict=True):
        assert (found - gradient).norm() <= 1e-5 * gradient.norm()


def test_each_pass_draws_other_masks_and_a_seed_draws_them_again():
    model = bundled_model(lora_dropout=0.5)
    lora, rows = fast_lora(model), some_rows()
    losses = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        lora.draw_dropout()
        assert len(lora.seeds.unique()) == len(lora.seeds)
        losses.append(pass_losses(model, rows)[0].detach())
    assert torch.equal(losses[0], losses[2])
    assert not torch.equal(losses[0], losses[1])


def test_kernels_that_do_not_run_are_left_out_with_a_line(monkeypatch, capsys):
    assert engine_lora.try_lora(CPU, torch.bfloat16)
    assert capsys.readouterr().err == ""

    def fail(*_):
        raise OSError("no compiler")

    monkeypatch.setattr(engine_lora, "drop", fail)
    assert not engine_lora.try_lora(CPU, torch.bfloat16)
    assert "The fused LoRA kernels do not serve here (OSError)" in capsys.readouterr().err


def test_kernels_that_compute_something_else_are_left_out_with_a_line(monkeypatch, capsys):
    original = engine_lora.matmul32
    monkeypatch.setattr(engine_lora, "matmul32", lambda *operands: original(*operands) * 1.2)
    assert not engine_lora.try_lora(CPU, torch.bfloat16)
    assert "The fused LoRA kernels do not serve here (wrong)" in capsys.readouterr().err


def test_memory_that_runs_out_inside_a_group_of_layers_leaves_nothing_alive():
    model = bundled_model()
    layers, read = transformers_model(model).get_decoder().layers, []
    runner = StepRunner(model, StepPlan(Kernels(lora=True), max_pass_tokens=1000))

    def fail(*_):
        raise torch.OutOfMemoryError("fake")

    failing = layers[-1].mlp.act_fn.register_forward_hook(fail)  # between gate and up
    layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, inputs: read.append(weakref.ref(inputs[0])))
    runner.begin()
    with contextlib.suppress(torch.OutOfMemoryError):
        runner.run_pass(some_rows(), 1.0)
    assert any(group.waiting for group in runner.lora.groups)
    runner.release()
    assert read[0]() is None
    failing.remove()
    layers[1].mlp.gate_proj(torch.randn(1, 3, 256))
    assert any(group.waiting for group in runner.lora.groups)
    runner.begin()
    assert not any(group.waiting for group in runner.lora.groups)
