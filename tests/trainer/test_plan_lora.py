"""The plan of GRPO with LoRA: adapters as PEFT counts them, and parts of what is trained alone."""

import pytest
import torch

from trainer.plan import lora
from trainer.plan.architectures import ARCHITECTURES
from trainer.plan.memory import step_memory


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("rank", [1, 16])
def test_parameters_are_pefts(rank):
    peft = pytest.importorskip("peft", reason="counts the adapters")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = ARCHITECTURES["qwen3-0.6b"]
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=model.hidden,
        num_hidden_layers=2,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        intermediate_size=model.intermediate,
    )
    with torch.device("meta"):
        built = Qwen3ForCausalLM(config)
    adapted = peft.get_peft_model(built, peft.LoraConfig(r=rank, target_modules="all-linear"))
    trained, _ = adapted.get_nb_trainable_parameters()
    assert lora.lora_parameters(model, rank) * 2 == trained * model.layers


@pytest.mark.parametrize("size", lora.SIZES)
def test_memory_is_the_planners_of_frozen_weights(size):
    options = lora.Lora()
    job = lora.lora_job(size, "4090", options)
    model = job.architecture
    memory, full = lora.lora_memory(job, options.rank), step_memory(job)
    adapters = 16 * lora.lora_parameters(model, options.rank)
    assert memory.keys() == full.keys()
    for phase, parts in memory.items():
        assert parts["weights"] == 2 * model.parameters
        assert parts[lora.ADAPTERS] == adapters
        assert all(full[phase][name] == x for name, x in parts.items() if name != lora.ADAPTERS)
    # Keys and values in bf16, of 64 sequences of 1,280 tokens.
    cache = 2 * 2 * model.layers * model.kv_heads * model.head_dim * 64 * 1280
    assert memory["sample"]["cache"] == cache
    assert not {"gradients", "AdamW's moments"} & memory["AdamW"].keys()
    assert "activations recomputed" in memory["last layer"]


def test_a_longer_completion_needs_more(capsys):
    assert lora.main(["--completion", "2048"]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == lora.lora_table("4090", lora.Lora(completion=2048))
    peaks = [float(x) for x in printed.splitlines()[-1].split()[-2:]]
    short = lora.lora_table("4090", lora.Lora()).splitlines()[-1].split()[-2:]
    assert all(peak > float(x) for peak, x in zip(peaks, short, strict=True))


def test_unknown_gpus_are_refused():
    with pytest.raises(ValueError, match="7090"):
        lora.lora_table("7090", lora.Lora())
