#!/usr/bin/env bash
# The 14B run of "Beyond the 80/20 Rule" (arXiv 2506.01939, section 5.2) on verl 0.9.1 and 16 nodes
# of 8 GPUs, with this package's head and exact mask:
#
#   pip install . "verl[vllm]==0.9.1"     # on every node
#   MODEL_PATH=... TRAIN_FILE=... TEST_FILE=... bash examples/verl_high_entropy_14b.sh
#
# More overrides can follow on the command line (trainer.nnodes=1); `--cfg job` prints the
# configuration and trains nothing. The settings are those of the authors' script
# (github.com/Shenzhi-Wang/Beyond-the-80-20-Rule-RLVR,
# run_only_top20_high_entropy_tokens_dapo_qwen3_14b.sh). What differs from it:
#
# - Its entropy_top_ratio=0.2 is the loss_mode "high_entropy". It too keeps ceil(0.2 n) response
#   tokens of each micro-batch on each rank. It divides by the 0.2 of the whole mini-batch, where
#   the script averages over each micro-batch and weighs it by its sequences.
# - Dynamic sampling: the script draws 1536 prompts at a time, up to 10 times, until 512 groups are
#   mixed. verl 0.9's trainer ignores both numbers, refills prompt by prompt and has up to
#   max_inflight_gen_batches x 512 on the way.
# - Data: DAPO-Math-17k, as in the paper (the script takes guru-RL-92k's math). verl scores it +1
#   and -1, the script 1 and 0; the overlong penalty therefore weighs half as much against it.
# - Old log-probs are recomputed by the trainer, as in the script (verl's default).
set -euo pipefail

MODEL_PATH=${MODEL_PATH:-Qwen/Qwen3-14B-Base}
TRAIN_FILE=${TRAIN_FILE:-$HOME/data/dapo-math-17k.parquet}
TEST_FILE=${TEST_FILE:-$HOME/data/aime-2024.parquet}

prompt=2048
response=20480

overrides=(
    # Head and mask.
    actor_rollout_ref.model.external_lib=entropy_kernels.integrations.verl_external_lib
    actor_rollout_ref.model.use_fused_kernels=True
    actor_rollout_ref.model.fused_kernel_options.impl_backend=torch
    actor_rollout_ref.actor.policy_loss.loss_mode=high_entropy
    actor_rollout_ref.actor.calculate_entropy=True

    # DAPO.
    algorithm.adv_estimator=grpo
    algorithm.use_kl_in_reward=False
    algorithm.kl_ctrl.kl_coef=0.0
    algorithm.filter_groups.enable=True
    algorithm.filter_groups.metric=acc
    algorithm.filter_groups.max_inflight_gen_batches=3
    actor_rollout_ref.actor.use_kl_loss=False
    actor_rollout_ref.actor.kl_loss_coef=0.0
    actor_rollout_ref.actor.entropy_coeff=0
    actor_rollout_ref.actor.clip_ratio_low=0.2
    actor_rollout_ref.actor.clip_ratio_high=0.28
    actor_rollout_ref.actor.clip_ratio_c=10.0
    actor_rollout_ref.actor.loss_agg_mode=token-mean
    reward.reward_manager.name=dapo
    +reward.reward_kwargs.overlong_buffer_cfg.enable=True
    +reward.reward_kwargs.overlong_buffer_cfg.len=4096
    +reward.reward_kwargs.overlong_buffer_cfg.penalty_factor=1.0
    +reward.reward_kwargs.overlong_buffer_cfg.log=False
    +reward.reward_kwargs.max_resp_len=$response

    # Data: 512 prompts a step, 32 an update, 16 responses each: 16 updates a step.
    "data.train_files=$TRAIN_FILE"
    "data.val_files=$TEST_FILE"
    data.prompt_key=prompt
    data.truncation=left
    data.max_prompt_length=$prompt
    data.max_response_length=$response
    data.train_batch_size=512
    actor_rollout_ref.actor.ppo_mini_batch_size=32
    actor_rollout_ref.rollout.n=16

    # Model and optimizer.
    "actor_rollout_ref.model.path=$MODEL_PATH"
    actor_rollout_ref.model.enable_gradient_checkpointing=True
    actor_rollout_ref.model.use_remove_padding=True
    actor_rollout_ref.actor.optim.lr=1e-6
    actor_rollout_ref.actor.optim.lr_warmup_steps=10
    actor_rollout_ref.actor.optim.weight_decay=0.1
    actor_rollout_ref.actor.optim.clip_grad=1.0

    # Memory: a micro-batch holds at most 8 x 22528 tokens over the 8 ranks of a sequence.
    actor_rollout_ref.actor.use_dynamic_bsz=True
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=$((prompt + response))
    actor_rollout_ref.actor.ulysses_sequence_parallel_size=8
    actor_rollout_ref.actor.fsdp_config.fsdp_size=-1
    actor_rollout_ref.actor.fsdp_config.param_offload=True
    actor_rollout_ref.actor.fsdp_config.optimizer_offload=True
    actor_rollout_ref.ref.log_prob_use_dynamic_bsz=True
    actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=$((prompt + response))
    actor_rollout_ref.ref.ulysses_sequence_parallel_size=8
    actor_rollout_ref.ref.fsdp_config.param_offload=True
    actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True
    actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=$((prompt + response))

    # Rollout and evaluation.
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.temperature=1.0
    actor_rollout_ref.rollout.top_p=1.0
    actor_rollout_ref.rollout.top_k=-1
    actor_rollout_ref.rollout.gpu_memory_utilization=0.80
    actor_rollout_ref.rollout.tensor_model_parallel_size=4
    actor_rollout_ref.rollout.enable_chunked_prefill=True
    actor_rollout_ref.rollout.max_num_batched_tokens=$((prompt + response))
    actor_rollout_ref.rollout.val_kwargs.temperature=1.0
    actor_rollout_ref.rollout.val_kwargs.top_p=0.7
    actor_rollout_ref.rollout.val_kwargs.top_k=-1
    actor_rollout_ref.rollout.val_kwargs.do_sample=True
    actor_rollout_ref.rollout.val_kwargs.n=1

    trainer.project_name=DAPO
    trainer.experiment_name=high-entropy-tokens-Qwen3-14B
    trainer.nnodes=16
    trainer.n_gpus_per_node=8
    trainer.val_before_train=True
    trainer.test_freq=5
    trainer.save_freq=5
    trainer.total_epochs=30
    trainer.resume_mode=auto
)

exec "${PYTHON:-python3}" -m verl.trainer.main_ppo "${overrides[@]}" "$@"
