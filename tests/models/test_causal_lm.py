"""hidden_states and output_head on small random models of each family, against the models' own logits."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from prune_opd.core.head import differentiable_head_statistics, head_statistics
from prune_opd.errors import ModelError
from prune_opd.models.causal_lm import check_liger, hidden_states, output_head

V, H, K = 61, 16, 5
SMALL = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "Llama": {"tie_word_embeddings": False},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5},
    "Gemma3": {"head_dim": 8, "final_logit_softcapping": 0.5},
    "Granite": {"logits_scaling": 7.0},
    "Cohere": {"logit_scale": 0.25},
}
CONFIG_NAMES = {"Gemma3": "Gemma3TextConfig"}


def build(family, dtype=torch.float32, **changes):
    config = getattr(transformers, CONFIG_NAMES.get(family, f"{family}Config"))(
        **SMALL | FAMILIES.get(family, {}) | changes
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():  # random models have logits near zero, where a soft-cap hides
            if parameter.dim() == 2:
                parameter.mul_(10)
    return model.to(dtype).eval()


def inputs():
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    return {
        "input_ids": torch.randint(3, V, (2, 9)) * mask,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_head_of_hidden_states_is_the_model(family):
    model, batch = build(family), inputs()
    kept = batch["attention_mask"].bool()
    logprobs = model(**batch).logits[kept].log_softmax(-1)

    head = output_head(model)
    hidden = hidden_states(model, batch)[kept]
    got = head_statistics(hidden, head, top_k=K)
    assert hidden.shape == (kept.sum(), H)
    assert head.weight is model.get_output_embeddings().weight
    torch.testing.assert_close(got.topk_logprobs, logprobs.topk(K).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.entropy, torch.special.entr(logprobs.exp()).sum(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_all_weights_are_those_of_the_model(family):
    """Tied embeddings too: their gradient is the sum of the body's and the head's."""
    model, batch = build(family), inputs()
    kept = batch["attention_mask"].bool()

    hidden = hidden_states(model, batch)[kept]
    got = differentiable_head_statistics(hidden, output_head(model), top_k=K)
    weights = torch.rand(got.topk_logprobs.shape)
    parameters = list(model.parameters())
    found = torch.autograd.grad((weights * got.topk_logprobs).sum(), parameters)

    logprobs = model(**batch).logits[kept].log_softmax(-1)
    expected = torch.autograd.grad((weights * logprobs.gather(-1, got.topk_ids)).sum(), parameters)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-7


@pytest.mark.parametrize("family", ["Qwen2", "Gemma2", "Granite"])
def test_bf16_models_pass_the_probe(family):
    model = build(family, torch.bfloat16)
    assert output_head(model).weight.dtype == torch.bfloat16


def lora(target_modules):
    return LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=target_modules, lora_dropout=0.1)


def test_a_lora_student_trains_its_adapters_through_the_head():
    model = get_peft_model(build("Qwen3"), lora("all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()  # zero at the start, which would hide an adapter that is left out
    model.eval()
    batch = inputs()
    kept = batch["attention_mask"].bool()
    got = differentiable_head_statistics(hidden_states(model, batch)[kept], output_head(model), top_k=K)
    logprobs = model(**batch).logits[kept].log_softmax(-1)
    torch.testing.assert_close(got.topk_logprobs, logprobs.topk(K).values, rtol=1e-5, atol=1e-5)

    adapters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(got.topk_logprobs[:, 0].sum(), adapters)
    for a, b in zip(found, torch.autograd.grad(logprobs.amax(-1).sum(), adapters), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-7


def test_adapters_on_the_head_itself_are_refused_before_they_have_an_effect():
    """At the start such an adapter adds nothing, so the probe alone would let it pass."""
    model = get_peft_model(build("Llama"), lora(["q_proj", "lm_head"]))
    with pytest.raises(ModelError, match=r"output head of LlamaForCausalLM is a Linear.*target_modules") as error:
        output_head(model)
    assert "needed" in str(error.value)


@pytest.mark.parametrize("softcap, scale", [(100.0, 1.0), (None, 1.05)])
def test_an_unknown_transformation_is_refused_by_name(softcap, scale):
    class OddForCausalLM(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * scale
            if softcap:
                output.logits = softcap * torch.tanh(output.logits / softcap)
            return output

    model = OddForCausalLM(transformers.LlamaConfig(**SMALL)).train()
    with pytest.raises(ModelError, match="OddForCausalLM does something to its logits"):
        output_head(model)
    assert model.training
    assert not model.model._forward_hooks


def test_a_family_that_reads_the_same_setting_the_other_way_round_is_refused():
    """HyperCLOVA X multiplies by logits_scaling, Granite divides."""
    with pytest.raises(ModelError, match="HyperCLOVAXForCausalLM does something to its logits"):
        output_head(build("HyperCLOVAX", logits_scaling=3.0))
    assert output_head(build("HyperCLOVAX", logits_scaling=1.0)).scale == 1


def test_the_probe_leaves_the_model_as_it_was():
    model, batch = build("Gemma2").train(), inputs()
    before = model(**batch).logits
    output_head(model)
    assert model.training
    assert torch.equal(model(**batch).logits, before)


def test_the_probe_runs_once_a_model_and_under_autocast_as_well():
    model = build("Granite")  # its division would be rounded to bf16, which the probe must not take for a difference
    forwards = []
    model.model.register_forward_hook(lambda *_: forwards.append(1))
    with torch.autocast("cpu", torch.bfloat16):
        heads = [output_head(model) for _ in range(3)]
    assert len(forwards) == 1
    assert all(head.weight is model.lm_head.weight and head.scale == 1 / 7 for head in heads)


def test_a_fused_head_without_its_kernels_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    for name in [name for name in sys.modules if name.startswith("liger_kernel.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModelError, match=r"liger_head.*\n.*prune-opd\[liger\]"):
        check_liger(torch.nn.Linear(1, 1))
