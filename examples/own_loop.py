"""RL on high-entropy tokens in a loop of one's own: a random Qwen3 learns to write small numbers.

Seconds on a CPU: `python examples/own_loop.py`
"""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import entropy_kernels as ek
from entropy_kernels.integrations.hf import patch_lm_head

VOCABULARY, PROMPTS, GROUP, PROMPT_LENGTH, LENGTH = 64, 8, 8, 4, 16

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, **sizes, **heads, **special))
patch_lm_head(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

for step in range(12):
    prompt = torch.randint(VOCABULARY, (PROMPTS, PROMPT_LENGTH)).repeat_interleave(GROUP, 0)
    # Without targets the model returns logits, so generate works as ever.
    tokens = model.generate(prompt, do_sample=True, top_k=0, max_new_tokens=LENGTH)
    reward = (tokens[:, PROMPT_LENGTH:] < VOCABULARY // 2).float().mean(1)
    groups = reward.view(PROMPTS, GROUP)
    advantage = ((groups - groups.mean(1, True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()

    # target[t] is the token that position t predicts: here those of the response.
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, PROMPT_LENGTH - 1 : -1] = True
    target = tokens.roll(-1, 1).masked_fill(~mask, -100)
    with torch.no_grad():
        old_logprob = model(tokens, target=target).logprob
    for _ in range(2):
        out = model(tokens, target=target)
        keep = ek.top_entropy_mask(out.entropy.detach(), mask, fraction=0.2)
        loss, _ = ek.ratio_loss(out.logprob, old_logprob, advantage, mask, selected=keep)
        optimizer.zero_grad()
        loss.backward()  # the head's backward runs on the selected rows
        optimizer.step()
    rows = f"{int(keep.sum())} of {int(mask.sum())} rows"
    print(f"step {step}: reward {reward.mean():.3f}, loss {loss:+.4f}, selected {rows}")
