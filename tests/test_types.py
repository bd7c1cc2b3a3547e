"""What a user's type checker sees of the installed package: types, and none of them Any."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.installed import ROOT, build_wheel, copy_checkout, install, run

PACKAGE = ROOT / "entropy_kernels"
TENSOR = "torch._tensor.Tensor"
HEAD = "torch.zeros(2, 8), torch.zeros(9, 8), torch.zeros(2, dtype=torch.int64)"
REVEALED = {
    f"ek.linear_logprob_entropy(ek.Head({HEAD})).logprob": TENSOR,
    f"ek.linear_logprob_entropy(ek.Head({HEAD})).varentropy": f"{TENSOR} | None",
    f"ek.high_entropy_policy_loss(ek.Head({HEAD}), None, x, m)": (
        f"tuple[{TENSOR}, dict[str, {TENSOR}]]"
    ),
    f"ek.HighEntropyPolicyLoss(fraction=0.2)(ek.Head({HEAD}), None, x, m)": (
        f"tuple[{TENSOR}, dict[str, {TENSOR}]]"
    ),
    "ek.ratio_loss(x, None, x, m)": f"tuple[{TENSOR}, dict[str, {TENSOR}]]",
    "ek.top_entropy_mask(x)": TENSOR,
    "ek.entropy_threshold(x, m, 0.2)": TENSOR,
    "ek.StreamingThreshold(0.2, mode='sketch').value()": TENSOR,
    "ek.LogprobEntropy(x, x, x).entropy": TENSOR,
    "ek.losses.gspo(x, x, x, m)": TENSOR,
    "sum_over_ranks(x, None)": TENSOR,
    "ek.__version__": "str",
}
WRONG = {
    f"ek.linear_logprob_entropy(ek.Head({HEAD}, temprature=1.0))": "call-arg",
    f"ek.linear_logprob_entropy(ek.Head({HEAD}, softcap='30'))": "arg-type",
    f"ek.HighEntropyPolicyLoss()(ek.Head({HEAD}), None)": "call-arg",
    "ek.HighEntropyPolicyLoss(kl_coeff=0.1)": "call-arg",
    "ek.ratio_loss(x, None, x, m, kl=0.1)": "arg-type",
    "ek.top_entropy_mask([0.1, 0.2])": "arg-type",
    "ek.no_such_name": "attr-defined",
}
HEADER = """
import torch
import entropy_kernels as ek
from entropy_kernels.distributed import sum_over_ranks

x, m = torch.zeros(2), torch.ones(2, dtype=torch.bool)
"""
# A state of more than one kind, as torch's; options that are checked as they are read; and what
# other libraries type so.
ANY = {
    ("backends.py", "verified", "call"),
    ("streaming_threshold.py", "state_dict", "return"),
    ("streaming_threshold.py", "load_state_dict", "state"),
    ("reference.py", "high_entropy_policy_loss", "ratio"),
    ("integrations/liger.py", "apply", "return"),
    ("integrations/trl.py", "high_entropy_mask_of_step", "self"),
    # vLLM's own options and objects, which differ between its two runners and its versions.
    ("integrations/vllm.py", "options", "llm_options"),
    ("integrations/vllm.py", "options", "return"),
    ("integrations/vllm.py", "take", "llm"),
    ("integrations/vllm.py", "take_async", "engine"),
    ("integrations/vllm.py", "forget", "llm"),
    ("integrations/vllm_processors.py", "__init__", "vllm_config"),
    ("integrations/vllm_processors.py", "__init__", "state"),
    ("integrations/vllm_processors.py", "apply", "ctx"),
}


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """An environment that has the wheel, and no checkout on its path."""
    folder = tmp_path_factory.mktemp("typed")
    wheel = build_wheel(copy_checkout(folder / "checkout"), folder / "wheel", compiler=False)
    return install(wheel, folder / "venv")


@pytest.fixture(scope="module")
def said(python, tmp_path_factory) -> list[str]:
    """What `mypy --strict` says of each of the lines below the header."""
    folder = tmp_path_factory.mktemp("user")
    lines = [*(f"reveal_type({expression})" for expression in REVEALED), *WRONG]
    script = folder / "user.py"
    script.write_text("\n".join([*HEADER.splitlines(), *lines, ""]))
    config = folder / "mypy.ini"
    config.write_text("[mypy]\n")
    options = "--strict", "--python-executable", python, "--config-file", config
    printed = run(sys.executable, "-m", "mypy", *options, script, cwd=folder, fails=True)
    said = dict.fromkeys(range(len(lines)), "")
    for found in re.finditer(r"user\.py:(\d+): (.*)", printed):
        said[int(found[1]) - len(HEADER.splitlines()) - 1] += found[2]
    return list(said.values())


def test_a_user_s_type_checker_sees_types(said):
    known = [f'note: Revealed type is "{kind}"' for kind in REVEALED.values()]
    assert said[: len(REVEALED)] == known


def test_a_user_s_type_checker_sees_mistakes(said):
    for call, problem, code in zip(WRONG, said[len(REVEALED) :], WRONG.values(), strict=True):
        assert f"[{code}]" in problem, f"{call}: {problem or 'no error'}"


def public_functions(path: Path) -> Iterator[ast.FunctionDef]:
    """Functions and methods that a user calls."""
    for node in ast.walk(ast.parse(path.read_text())):
        inside = node.body if isinstance(node, ast.Module) else []
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            inside = node.body
        for child in inside:
            named = isinstance(child, ast.FunctionDef) and not child.name.startswith("_")
            if named or getattr(child, "name", "") in ("__init__", "__call__"):
                yield child


def public_modules() -> list[Path]:
    """All that a user imports; `ops` and `verification` are for those who look inside."""
    found = (path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py")))
    inside = ("ops.py", "verification")
    return [x for x in found if x.parts[0] not in inside and not any(y[0] == "_" for y in x.parts)]


@pytest.mark.parametrize("name", public_modules(), ids=str)
def test_all_that_is_public_has_types(name):
    for function in public_functions(PACKAGE / name):
        arguments = function.args
        all_of_them = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        all_of_them += filter(None, [arguments.vararg, arguments.kwarg])
        types = {x.arg: x.annotation for x in all_of_them if x.arg not in ("self", "cls")}
        for argument, kind in {**types, "return": function.returns}.items():
            where = (str(name), function.name, argument)
            assert kind is not None, f"{where} has no type"
            assert where in ANY or not re.search(r"\bAny\b", ast.unparse(kind)), f"{where} is Any"
