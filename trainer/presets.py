"""The paper's runs, its baselines and smaller ones, as functions that return a `Config`.

"The paper" is "Beyond the 80/20 Rule" (arXiv 2506.01939v2, section 5.2); "the script" is its
authors' (github.com/Shenzhi-Wang/Beyond-the-80-20-Rule-RLVR,
run_only_top20_high_entropy_tokens_dapo_qwen3_14b.sh); "DAPO" is arXiv 2503.14476. What none of
them gives is marked "our choice".
"""

from collections.abc import Callable
from dataclasses import replace

from trainer.config import (
    Algorithm,
    Config,
    Data,
    Engine,
    Eval,
    Model,
    Optimizer,
    Rollout,
    WarmStart,
)

QUESTION = (
    "User:\n{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
    "\n\nAssistant:\n"
)
"""The paper's chat template, section 5.2."""


def tiny() -> Config:
    """A 0.3 M-parameter Qwen3 on the number ladder: warm start and RL in minutes on a laptop."""
    return Config(
        steps=100,
        threads=1,
        eval=Eval(problems=1024),
        warm_start=WarmStart(steps=600),
        algorithm=Algorithm(max_rounds=2),
    )


def tiny_long() -> Config:
    """The same policy on the long number ladder: twice the length, two decisions per step."""
    config = tiny()
    return replace(
        config,
        name="tiny-long",
        data=Data(task="ladder:long"),
        rollout=Rollout(max_new_tokens=64),
        warm_start=WarmStart(steps=1600, traces=100_000),
    )


def dapo_math() -> Data:
    """DAPO-Math-17K, the paper's data: its questions without DAPO's own instruction around them.

    This is the copy of BytedTsinghua-SIA/DAPO-Math-17k without repetitions, 17,398 prompts: as many
    as the 10,000 and 7,398 that the paper splits for Llama. 1% is held out for the evaluations
    within a run (our choice; the paper evaluates on other sets).
    """
    return Data(
        task="hub:open-r1/DAPO-Math-17k-Processed:all",
        prompt_field="prompt",
        answer_field="solution",
        template=QUESTION,
        test_fraction=0.01,
        max_prompt_tokens=2048,
    )


def dapo(name: str, path: str) -> Config:
    """DAPO as the paper and the script run it, on all tokens.

    Paper: clip 0.2 and 0.28; 512 prompts per step and 32 per update, so 16 updates. Responses have
    up to 20,480 tokens, punished over the last 4,096. Learning rate 1e-6, no KL or entropy term,
    temperature 1.

    DAPO, section 4.1: 16 responses per prompt.

    Script: dual clip 10, weight decay 0.1, gradient clip 1, a punishment of up to 1 on rewards of 1
    and 0. Prompts of up to 2,048 tokens, 0.8 of a GPU for vLLM, an evaluation and a checkpoint
    every 5 steps, 16 nodes of 8 GPUs. Its warm-up of 10 counts steps, which are 160 updates; the
    paper says none. It samples 1,536 prompts at a time, up to 10 times, until 512 groups are
    useful, and stops if they never are. We sample 512 at a time, up to 30 times, and then leave the
    step out.

    verl's default: betas 0.9 and 0.999.

    Our choice: 100 steps (Table 1 of the paper follows a 14B run to update 1,360, or step 85), 64
    held-out problems, micro-batches of one longest sequence. Every 20th step's checkpoint stays for
    good.
    """
    return Config(
        name=name,
        steps=100,
        eval=Eval(every=5, problems=64),
        checkpoint_every=5,
        keep_every=20,
        model=Model(
            path=path,
            compute_dtype="bfloat16",
            attention="flash_attention_2",
            gradient_checkpointing=True,
        ),
        data=dapo_math(),
        engine=Engine(
            kind="vllm",
            memory_utilization=0.8,
            max_model_len=2048 + 20_480,
            dtype="bfloat16",
        ),
        rollout=Rollout(prompts=512, group_size=16, max_new_tokens=20_480, batch_size=512),
        algorithm=Algorithm(
            fraction=1.0,
            clip_low=0.2,
            clip_high=0.28,
            dual_clip=10.0,
            max_rounds=30,
            min_groups=512,
            overlong_cache=4096,
            overlong_factor=1.0,
        ),
        optimizer=Optimizer(
            learning_rate=1e-6,
            warmup_steps=160,
            betas=(0.9, 0.999),
            weight_decay=0.1,
            grad_clip=1.0,
            mini_batches=16,
            tokens_per_micro_batch=2048 + 20_480,
        ),
    )


def high_entropy(config: Config) -> Config:
    """`config` on the fifth of its tokens with the highest entropies under the current policy.

    Paper, equation 6: divided by the number of those tokens. Other entropies cost less. The head
    has 2.6 products of T x D x V, by `--algorithm.entropy-source old` 1.6, by `sampler` 0.8.
    """
    algorithm = replace(config.algorithm, fraction=0.2, entropy_source="current")
    return replace(config, algorithm=replace(algorithm, denominator="selected"))


def longer(config: Config, model: str) -> Config:
    """The paper's continuation with responses of up to 29,696 tokens, from an exported model.

    The paper lengthens the 32B run from 20,480; the same 4,096 tokens at its end are punished.
    """
    return replace(
        config,
        name=f"{config.name}-29k",
        model=replace(config.model, path=model),
        engine=replace(config.engine, max_model_len=2048 + 29_696),
        rollout=replace(config.rollout, max_new_tokens=29_696),
        optimizer=replace(config.optimizer, tokens_per_micro_batch=2048 + 29_696),
    )


def grpo(config: Config) -> Config:
    """`config` with DAPO's four changes taken back: the "naive GRPO" of DAPO, section 4.1.

    One clip range of 0.2, a mean over sequences of their means, one round of sampling, no
    punishment of length. No dual clip is our choice. All else is as there: no KL term (GRPO itself,
    arXiv 2402.03300, has one of 0.04), batch, learning rate. Groups whose rewards are all equal
    have no gradient; they are left out of the mean too, which scales it.
    """
    algorithm = Algorithm(loss_type="grpo", fraction=1.0, clip_high=0.2)
    return replace(config, name=f"grpo-{config.name}", algorithm=algorithm)


def llama(path: str) -> Config:
    """Llama-3.1-8B after its cold start, high-entropy DAPO on the other 7,398 prompts.

    Paper, appendix: the base model cannot do it, so it is first trained on 10,000 right responses
    of Qwen3-32B to prompts of DAPO-Math-17K. Neither the responses nor the settings of that
    training are published, and `warm_start` trains neither on a file nor on several GPUs. So `path`
    is a model trained elsewhere, and the other prompts are a local file. Llama's tokenizer starts a
    text with a token of its own, and not twice where a template writes it out.
    """
    config = high_entropy(dapo("llama-8b", path))
    template = "<|begin_of_text|>" + QUESTION
    data = replace(dapo_math(), task="file:data/dapo-math-7398.jsonl", template=template)
    return replace(config, data=data)


def single_gpu(name: str, path: str) -> Config:
    """High-entropy DAPO on one GPU of 80 GB; all of it our choice, none of it the paper's.

    Shorter responses (4,096), 32 prompts x 8, 2 updates per step, the sampling policy's entropies.
    `python -m trainer plan qwen3-1.7b --gpu h100` gives the memory.
    """
    config = dapo(name, path)
    return replace(
        config,
        steps=300,
        eval=replace(config.eval, every=20),
        checkpoint_every=20,
        keep_every=100,
        model=replace(config.model, attention="sdpa"),
        engine=replace(config.engine, memory_utilization=0.5, max_model_len=2048 + 4096),
        rollout=Rollout(prompts=32, group_size=8, max_new_tokens=4096, batch_size=64),
        algorithm=replace(
            config.algorithm, fraction=0.2, max_rounds=3, min_groups=8, overlong_cache=1024
        ),
        optimizer=replace(
            config.optimizer, warmup_steps=10, mini_batches=2, tokens_per_micro_batch=8192
        ),
    )


def _qwen3(size: str) -> dict[str, Callable[[], Config]]:
    """The runs of one size: the paper's, on all tokens, the baseline, the continuation.

    The 32B base model is not published: `--model.path` names a folder of your own there.
    """
    name, path = f"qwen3-{size.lower()}", f"Qwen/Qwen3-{size}-Base"
    return {
        name: lambda: high_entropy(dapo(name, path)),
        f"{name}-dapo": lambda: dapo(f"{name}-dapo", path),
        f"{name}-29k": lambda: longer(high_entropy(dapo(name, path)), f"runs/{name}/exported"),
        f"grpo-{name}": lambda: grpo(dapo(name, path)),
    }


PRESETS: dict[str, Callable[[], Config]] = {
    "tiny": tiny,
    "tiny-long": tiny_long,
    **_qwen3("8B"),
    **_qwen3("14B"),
    **_qwen3("32B"),
    "llama-8b": lambda: llama("runs/llama-8b-cold-start/exported"),
    "qwen3-0.6b": lambda: single_gpu("qwen3-0.6b", "Qwen/Qwen3-0.6B-Base"),
    "qwen3-1.7b": lambda: single_gpu("qwen3-1.7b", "Qwen/Qwen3-1.7B-Base"),
}
