"""What our calls find in each of vLLM's workers. Without an import of vLLM."""

from typing import Any

from ._vllm_records import Records


class WorkerExtension:
    """Methods of vLLM's worker for `collective_rpc`, by name."""

    def entropy_kernels_read(self, keys: list[int | str], lengths: list[int]) -> bytes:
        """What this worker has of the requests; nothing is forgotten."""
        found = self._entropy_kernels_records()
        return b"" if found is None else found.read(keys, lengths)

    def entropy_kernels_forget(self, keys: list[int | str] | None) -> None:
        """Forget those requests, or all."""
        if (found := self._entropy_kernels_records()) is not None:
            found.forget(keys)

    def _entropy_kernels_records(self) -> Records | None:
        """Those of our processor, which only the last stage of a pipeline has under runner V2."""
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        if hasattr(runner, "input_batch"):  # V1
            processors = list(runner.input_batch.logitsprocs.all)
        else:
            processors = getattr(getattr(runner, "sampler", None), "logits_processors", [])
        for processor in processors:
            if isinstance(found := getattr(processor, "records", None), Records):
                return found
        return None
