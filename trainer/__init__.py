"""A thin GRPO/DAPO trainer on high-entropy tokens, built on entropy_kernels."""
