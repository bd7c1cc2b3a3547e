"""The presets against the numbers of the paper and its script."""

from dataclasses import replace

import pytest
from datasets import Dataset

from trainer.config import Config
from trainer.presets import PRESETS, QUESTION
from trainer.tasks import make_task

SIZES = ("8b", "14b", "32b")
PAPER = [f"qwen3-{size}{kind}" for size in SIZES for kind in ("", "-dapo", "-29k")]


def test_each_is_a_configuration_that_names_itself():
    for name, preset in PRESETS.items():
        config = preset()
        assert isinstance(config, Config)
        assert config.name == name
    assert set(PRESETS) == {
        *("tiny", "tiny-long"),
        *PAPER,
        *(f"grpo-qwen3-{size}" for size in SIZES),
        *("llama-8b", "qwen3-0.6b", "qwen3-1.7b"),
    }


@pytest.mark.parametrize("name", [*PAPER, "llama-8b"])
def test_the_numbers_of_the_paper(name):
    """Section 5.2 and the script: 512 prompts of 16, 32 per update, 10 draws of 1,536."""
    config = PRESETS[name]()
    rollout, algorithm, optimizer = config.rollout, config.algorithm, config.optimizer
    updates = optimizer.mini_batches
    assert (rollout.prompts, rollout.group_size, rollout.temperature) == (512, 16, 1.0)
    assert rollout.prompts * rollout.group_size == 8192
    assert (updates, rollout.prompts // updates) == (16, 32)
    assert rollout.max_new_tokens == (29_696 if name.endswith("29k") else 20_480)
    assert optimizer.tokens_per_micro_batch == 2048 + rollout.max_new_tokens
    assert algorithm.max_rounds * rollout.prompts == 10 * 1536
    assert (algorithm.clip_low, algorithm.clip_high, algorithm.dual_clip) == (0.2, 0.28, 10.0)
    assert (algorithm.loss_type, algorithm.advantage) == ("dapo", "grpo")
    assert (algorithm.overlong_cache, algorithm.overlong_factor) == (4096, 1.0)
    assert algorithm.fraction == (1.0 if name.endswith("-dapo") else 0.2)
    if algorithm.fraction < 1:
        assert (algorithm.which, algorithm.entropy_source) == ("top", "current")
        assert algorithm.denominator == "selected"
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.grad_clip) == (1e-6, 0.1, 1)
    assert optimizer.warmup_steps == 10 * updates
    assert config.model.gradient_checkpointing
    assert (config.model.dtype, config.model.compute_dtype) == ("float32", "bfloat16")
    assert (config.engine.kind, config.engine.dtype) == ("vllm", "bfloat16")
    assert config.engine.max_model_len == 2048 + rollout.max_new_tokens
    assert config.engine.memory_utilization == 0.8
    assert config.data.max_prompt_tokens == 2048
    assert (config.checkpoint_every, config.keep_every) == (5, 20)


@pytest.mark.parametrize("size", SIZES)
def test_high_entropy_differs_from_dapo_in_the_tokens_alone(size):
    """As the authors' two scripts do, which differ in one line."""
    dapo, ours = PRESETS[f"qwen3-{size}-dapo"](), PRESETS[f"qwen3-{size}"]()
    tokens = {"fraction": 1.0, "entropy_source": "auto"}
    assert replace(ours, name=dapo.name, algorithm=replace(ours.algorithm, **tokens)) == dapo
    assert dapo.model.path == f"Qwen/Qwen3-{size.upper()}-Base"


def test_the_continuation_differs_in_length_and_start_alone():
    short, long = PRESETS["qwen3-32b"](), PRESETS["qwen3-32b-29k"]()
    assert long.model.path == "runs/qwen3-32b/exported"
    back = replace(
        long,
        name=short.name,
        model=short.model,
        engine=short.engine,
        rollout=replace(long.rollout, max_new_tokens=20_480),
        optimizer=replace(long.optimizer, tokens_per_micro_batch=2048 + 20_480),
    )
    assert back == short


def test_grpo_takes_dapos_changes_back():
    dapo, grpo = PRESETS["qwen3-8b-dapo"](), PRESETS["grpo-qwen3-8b"]()
    algorithm = grpo.algorithm
    assert (algorithm.loss_type, algorithm.clip_low, algorithm.clip_high) == ("grpo", 0.2, 0.2)
    assert (algorithm.max_rounds, algorithm.overlong_cache, algorithm.fraction) == (1, 0, 1.0)
    assert replace(grpo, name=dapo.name, algorithm=dapo.algorithm) == dapo


def dapo_task(folder, prompts, repeats=1, **data):
    """The task of the paper's settings on 400 rows with the columns of DAPO's copies.

    `prompts` makes the columns of a row's prompt. The hub is out of reach here.
    """
    rows = [
        {
            "data_source": "math_dapo",
            "ability": "MATH",
            "reward_model": {"ground_truth": str(2 * i), "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": str(i)},
            **prompts(i, [{"role": "user", "content": f"Solve: {i} + {i}"}]),
        }
        for i in range(400)
    ]
    file = folder / "dapo.parquet"
    Dataset.from_list(rows * repeats).to_parquet(str(file))
    return make_task(replace(PRESETS["qwen3-14b"]().data, task=f"file:{file}", **data), 0)


@pytest.mark.usefixtures("own_cache")
def test_the_papers_prompt_from_rows_of_its_data(tmp_path):
    """A file with the columns of open-r1/DAPO-Math-17k-Processed."""

    def prompts(i, chat):
        return {"prompt": f"Find ${i} + {i}$.", "solution": str(2 * i), "source_prompt": chat}

    task = dapo_task(tmp_path, prompts)
    assert 0 < task.num_test < 20
    problem = task.problem("train", 0)
    number = int(problem.answer) // 2
    assert problem.prompt == (
        f"User:\nFind ${number} + {number}$.\nPlease reason step by step, and put your final "
        "answer within \\boxed{}.\n\nAssistant:\n"
    )
    assert task.reward(problem, f"so \\boxed{{{2 * number}}}") == 1.0


@pytest.mark.usefixtures("own_cache")
def test_dapos_own_copy_can_be_named(tmp_path):
    """A file with the columns of BytedTsinghua-SIA/DAPO-Math-17k, in which each prompt repeats."""
    data = {"answer_field": "reward_model.ground_truth", "test_fraction": 0.1}
    task = dapo_task(tmp_path, lambda _, chat: {"prompt": chat}, 3, **data)
    prompts = {task.problem("train", i).prompt for i in range(400 - task.num_test)}
    assert len(prompts) == 400 - task.num_test
    problem = task.problem("train", 7)
    question = problem.prompt.removeprefix("User:\n").partition("\n")[0]
    assert question == f"Solve: {int(problem.answer) // 2} + {int(problem.answer) // 2}"
    assert problem.prompt == QUESTION.replace("{question}", question)
