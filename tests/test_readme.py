"""README and docs: their training loops, as printed, give the gradients of logits, and their tables
name every loss and statistic.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels._rows import STATISTICS
from entropy_kernels.integrations.hf import lm_head
from entropy_kernels.losses import LOSSES
from tests.integrations.small_models import assert_same_gradients, batch, build

ROOT = Path(__file__).parents[1]


def snippet(page, heading):
    """The first Python block of a section."""
    section = (ROOT / page).read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.S)[0]


WHOLE = snippet("README.md", "Use")
PARTS = snippet("docs/usage.md", "The head alone")
MODELS = ("qwen3", "qwen3-tied", "gemma2", "hyperclovax", "llama4", "LoRA", "LoRA on the head")


def make(name):
    if not name.startswith("LoRA"):
        return build(name)
    peft = pytest.importorskip("peft", reason="its adapters are what is tested")
    targets = ["q_proj", "lm_head"] if name.endswith("head") else ["q_proj"]
    model = peft.get_peft_model(build("qwen3"), peft.LoraConfig(target_modules=targets, r=4))
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def variables(model):
    """What the snippets take from the reader's program."""
    tokens = batch()
    ids, attention_mask = tokens["input_ids"], tokens["attention_mask"]
    response_mask = attention_mask.bool() & (torch.arange(ids.shape[1]) > 4)
    return {
        "model": model,
        "input_ids": ids,
        "attention_mask": attention_mask,
        "response_mask": response_mask,
        "old_logprob": torch.full((3, 10), -3.0),
        "advantage": torch.tensor([1.0, -0.5, 2.0]),
        "target": ids[:, 1:],
        "mask": response_mask[:, 1:],
        "your_loss": torch.negative,
    }


def by_logits(given):
    logits = given["model"](
        given["input_ids"], attention_mask=given["attention_mask"], use_cache=False
    ).logits[:, :-1]
    logp = logits.double().log_softmax(-1)
    entropy = torch.special.entr(logp.exp()).sum(-1)
    keep = ek.top_entropy_mask(entropy.detach().float(), given["mask"], fraction=0.2)
    return logp.gather(-1, given["target"][..., None])[..., 0], keep


def gradients(model):
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("name", MODELS)
def test_the_training_loop(name):
    model = make(name)
    given = variables(model)
    logprob, keep = by_logits(given)
    want, _ = ek.ratio_loss(
        logprob.float(), given["old_logprob"], given["advantage"], given["mask"], selected=keep
    )
    want.backward(retain_graph=True)
    want_grads = gradients(model)
    namespace = dict(given)
    exec(WHOLE, namespace)
    torch.testing.assert_close(namespace["loss"], want, rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients(model), want_grads, digits=5e-5)
    assert any("lora_A" in key and "lm_head" in key for key in want_grads) == (
        name == "LoRA on the head"
    )

    want = -(logprob * keep).sum() / keep.sum()
    want.backward()
    want_grads = gradients(model)
    hidden = namespace["head"].hidden_states(
        given["input_ids"], attention_mask=given["attention_mask"]
    )
    namespace["hidden"] = hidden[:, :-1]
    exec(PARTS, namespace)
    namespace["loss"].backward()
    torch.testing.assert_close(namespace["loss"].double(), want, rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients(model), want_grads, digits=5e-5)


def test_the_two_ways_to_the_sampler_s_sets_are_one_and_the_head_trains_them():
    """Those of docs/usage.md, as they are printed: of a batch's logits, and of vLLM's lists."""
    model = build("qwen3")
    given = variables(model)
    mask, target = given["mask"], given["target"]
    with torch.no_grad():
        logits = model(given["input_ids"], attention_mask=given["attention_mask"]).logits[:, :-1]
    kept = logits >= logits.topk(5).values[..., -1:]
    kept.scatter_(-1, target[..., None], True)
    cut = logits.masked_fill(~kept, -torch.inf)
    lists = [[row.nonzero()[:, 0].tolist() for row in kept[b][mask[b]]] for b in range(len(kept))]
    outputs = [SimpleNamespace(sampling_mask=SimpleNamespace(token_ids=ids)) for ids in lists]
    head = lm_head(model)
    hidden = head.hidden_states(given["input_ids"], attention_mask=given["attention_mask"])[:, :-1]
    given |= {
        "ek": ek,
        "torch": torch,
        "head": head,
        "hidden": hidden,
        "outputs": outputs,
        "truncated_logits": cut,
    }
    first, second, use = snippet("docs/usage.md", "Over the sampler's kept set").split("\n\n")
    want = cut.log_softmax(-1).gather(-1, target[..., None])[..., 0]
    losses = []
    for block in (first, second):
        namespace = dict(given)
        exec(f"{block}\n{use}", namespace)
        losses.append(namespace["loss"])
        torch.testing.assert_close(namespace["out"].logprob[mask], want[mask], rtol=1e-5, atol=1e-6)
        assert namespace["out"].logprob[~mask].count_nonzero() == 0
    assert losses[0] == losses[1]


def test_the_loop_that_keeps_the_head_s_gradient():
    """That of docs/method.md, as it is printed: two steps of two micro-batches, tied and not."""
    loop = snippet("docs/method.md", "Gradients in existing memory")
    for name in ("qwen3", "qwen3-tied"):
        found = []
        for code in (loop, loop.replace("main_grad=weight.grad", "main_grad=None")):
            model = make(name)
            given = variables(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            places = set()
            for _ in range(2):
                names = ("old_logprob", "advantage", "mask")
                parts = [
                    SimpleNamespace(
                        input_ids=given["input_ids"][rows],
                        attention_mask=given["attention_mask"][rows],
                        target=given["target"][rows],
                        tokens={n: given[n][rows] for n in names} | {"fraction": 0.5},
                    )
                    for rows in (slice(0, 2), slice(2, 3))
                ]
                exec(
                    code,
                    {
                        "ek": ek,
                        "model": model,
                        "head": lm_head(model),
                        "parts": parts,
                        "optimizer": optimizer,
                        "denominator": 10.0,
                    },
                )
                places.add(model.get_output_embeddings().weight.grad.data_ptr())
            assert len(places) == 1
            found.append([p.detach() for p in model.parameters()])
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_every_statistic_of_the_head_is_in_the_docs():
    usage, docstring = (ROOT / "docs" / "usage.md").read_text(), ek.linear_logprob_entropy.__doc__
    assert [name for name in STATISTICS if f"`{name}`" not in usage] == []
    assert [name for name in STATISTICS if f'"{name}"' not in docstring] == []


def test_every_loss_is_in_the_docs():
    page = (ROOT / "docs" / "losses.md").read_text()
    rows = "\n".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    assert [name for name in LOSSES if f"`{name}`" not in rows] == []
    assert [name for name in LOSSES if f'"{name}"' not in ek.ratio_loss.__doc__] == []
