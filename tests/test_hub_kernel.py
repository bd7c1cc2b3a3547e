"""A repository for the Hugging Face Hub: `kernels` loads it, and it computes rightly by itself."""

import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest

from tools import hub_kernel

needs_kernels = pytest.mark.skipif(
    find_spec("kernels") is None, reason="the package kernels is missing: pip install kernels"
)
LOAD = """
    import sys, warnings
    from pathlib import Path

    sys.modules.update(dict.fromkeys(BLOCKED))
    warnings.simplefilter("ignore")
    import torch
    from kernels import get_local_kernel

    ek = get_local_kernel(Path(sys.argv[1]), backend="cpu")
"""
COMPUTES = """
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 9, 16), torch.randn(71, 16)
    target, mask = torch.randint(71, (2, 9)), torch.rand(2, 9) < 0.8
    old, advantage = -torch.rand(2, 9) - 3, torch.randn(2)

    def truth(hidden, weight):
        logp = (hidden @ weight.T).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        logprob = logp.gather(-1, target[..., None]).squeeze(-1)
        k = -(-int(mask.sum()) // 5)
        keep = mask & (entropy.detach() >= entropy.detach()[mask].topk(k).values[-1])
        ratio = (logprob - old).exp()
        a = advantage[:, None].expand(2, 9)
        loss = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a)
        return logprob, entropy, (loss * keep).sum() / keep.sum()

    inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
    wide = [x.double().requires_grad_() for x in (hidden, weight)]
    head = ek.Head(*inputs, target)
    out = ek.linear_logprob_entropy(head)
    loss, metrics = ek.high_entropy_policy_loss(head, old, advantage, mask)
    logprob, entropy, want = truth(*wide)
    pairs = [(out.logprob, logprob), (out.entropy, entropy), (loss, want)]
    pairs += zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(want, wide))
    for got, right in pairs:
        error = float((got - right).abs().max() / right.abs().max())
        assert error < 1e-5, error
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "entropy-kernels"
    hub_kernel.layout(out, "someone/entropy-kernels", 0)
    return out


def load(repository: Path, *code: str, blocked: tuple[str, ...], where: Path) -> str:
    """What a process prints that loads the kernel and goes on."""
    script = f"BLOCKED = {blocked!r}\n" + "".join(map(textwrap.dedent, (LOAD, *code)))
    command = sys.executable, "-c", script, str(repository)
    done = subprocess.run(command, cwd=where, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_kernels
def test_kernels_loads_it_and_it_is_right_by_itself(repository, tmp_path):
    """Without what no Hub kernel may need, and without the installed package."""
    blocked = "jaxtyping", "beartype", "triton", "numpy", "transformers", "entropy_kernels"
    report = """
        from kernels import get_loaded_kernels
        (loaded,) = get_loaded_kernels()
        space = getattr(torch.ops, loaded.metadata.id)
        assert space.linear_logprob_entropy.default and space.ratio_loss.default
        assert not hasattr(torch.ops.entropy_kernels, "ratio_loss")
        assert ek.__name__ == loaded.metadata.id, ek.__name__
        print(loaded.metadata.name, loaded.metadata.backend, ek.__file__)
    """
    printed = load(repository, COMPUTES, report, blocked=blocked, where=tmp_path)
    assert printed.startswith("entropy-kernels")
    assert str(repository / "build" / "torch-cpu") in printed


@needs_kernels
def test_it_lives_beside_the_installed_package(repository):
    both = """
        import entropy_kernels as installed
        assert ek is not installed and ek.linear_logprob_entropy is not (
            installed.linear_logprob_entropy)
        hidden, weight, target = torch.randn(5, 8), torch.randn(31, 8), torch.randint(31, (5,))
        ours, theirs = (
            x.linear_logprob_entropy(x.Head(hidden, weight, target), impl="torch")
            for x in (installed, ek))
        assert all(map(torch.equal, ours[:3], theirs[:3]))
        assert torch.ops.entropy_kernels.ratio_loss is not getattr(
            torch.ops, ek.__name__).ratio_loss
        assert isinstance(ours, installed.LogprobEntropy) and isinstance(theirs, ek.LogprobEntropy)
    """
    load(repository, both, COMPUTES, blocked=(), where=hub_kernel.ROOT)


@needs_kernels
def test_each_variant_is_what_kernels_wants(repository):
    from kernels._rust import Backend, Build, Digest, DigestAlgorithm, Metadata
    from kernels.variants import get_variants_local

    names = {variant.variant_str for variant in get_variants_local(repository / "build")}
    assert names == {f"torch-{backend}" for backend in hub_kernel.BACKENDS}
    identifiers = set()
    for backend in hub_kernel.BACKENDS:
        folder = repository / "build" / f"torch-{backend}"
        metadata = Metadata.read_from_file(folder / "metadata.json")
        identifiers.add(metadata.id)
        assert metadata.id.isidentifier()
        assert str(metadata.name) == "entropy-kernels"
        assert metadata.python_depends == []
        assert metadata.backend.backend_type == Backend.from_str(backend)
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))
    assert len(identifiers) == len(names)
    build = Build.open(repository)
    assert [*map(str, build.general.backends)] == [*hub_kernel.BACKENDS]


def test_the_identifier_changes_with_the_contents_alone(repository, tmp_path, monkeypatch):
    hub_kernel.layout(tmp_path / "again", "someone/entropy-kernels", 0)
    one, again = (
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (repository, tmp_path / "again")
    )
    assert one == again
    monkeypatch.setattr(hub_kernel, "NOT_BUILT", "other contents")
    hub_kernel.layout(tmp_path / "other", "someone/entropy-kernels", 0)
    metadata = Path("build", "torch-cpu", "metadata.json")
    assert (tmp_path / "other" / metadata).read_bytes() != one[metadata]


def test_the_folder_of_earlier_releases_has_the_same_names(repository):
    folder = repository / "build" / "torch-cpu"
    script = (
        "import entropy_kernels as ek; "
        f"assert ek.__file__.startswith({str(folder)!r}), ek.__file__; "
        "assert set(ek.__all__) <= set(vars(ek)); print(ek.linear_logprob_entropy.__module__)"
    )
    command = sys.executable, "-c", script
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("_entropy_kernels_cpu_")


def test_the_card_and_the_sources_are_there(repository):
    card = (repository / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\n---\n")
    assert "docs/picture" not in card
    assert 'get_kernel("someone/entropy-kernels", version=0' in card
    assert "`high_entropy_policy_loss`" in card
    sources = repository / "torch-ext" / "entropy_kernels"
    assert (sources / "_triton" / "ratio_loss" / "launch.py").is_file()
    assert not (sources / "integrations").exists()


@pytest.mark.parametrize(
    ("used", "version", "problem"),
    [(True, 0, "OUT must be a new or empty folder"), (False, -1, "version must be >= 0; got -1")],
)
def test_mistakes_are_named_before_anything_is_written(tmp_path, used, version, problem):
    out = tmp_path / "out"
    if used:
        out.mkdir()
        (out / "file").touch()
    with pytest.raises(ValueError, match=problem):
        hub_kernel.layout(out, "someone/entropy-kernels", version)
    assert [*tmp_path.rglob("*")] == ([out, out / "file"] if used else [])
