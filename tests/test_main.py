"""python -m entropy_kernels: it reports what works, and does not report what does not."""

import entropy_kernels as ek
from entropy_kernels import __main__ as main
from entropy_kernels import _native, reference


def test_every_backend_is_checked(capsys):
    assert main.main() == 0
    printed = capsys.readouterr().out
    assert "linear_logprob_entropy, torch on cpu: ok" in printed
    assert "ratio_loss, torch on cpu: ok" in printed
    assert "top_entropy_mask on cpu: ok" in printed
    assert f"entropy_kernels {ek.__version__}" in printed
    assert "compiled CPU kernels: " + (_native.why_missing("cpu") or "loaded") in printed


def test_a_wrong_result_fails(capsys, monkeypatch):
    def wrong(*args, **kwargs):
        logprob, entropy, logsumexp = truth(*args, **kwargs)
        return logprob, entropy * 1.001, logsumexp

    truth = reference.linear_logprob_entropy
    monkeypatch.setattr(reference, "linear_logprob_entropy", wrong)
    monkeypatch.setattr(reference, "top_entropy_mask", lambda entropy: entropy > 0.5)
    monkeypatch.setattr(reference, "ratio_loss", lambda logprob, *_: logprob.sum())
    assert main.main() == 1
    printed = capsys.readouterr().out
    assert "FAILED: entropy is off by 1.0e-03" in printed
    assert "FAILED: the loss is off by" in printed
    assert "tokens differ" in printed
