"""Imports go one way: each module of the package names only the layers below it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import entropy_kernels

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "entropy_kernels"
ANYTHING = None
# Every module may import these, which import nothing of the package.
EVERYWHERE = {"_arguments", "_compiler", "_ops", "_shapes"}
ALLOWED = {
    "head": set(),
    "support": set(),
    "reference": {"head", "support"},
    "distributed": set(),
    "losses": {"distributed"},
    "loss_terms": {"distributed", "losses"},
    "token_rules": {"_ragged", "losses"},
    "_bounds": set(),
    "_rows": {"head"},
    "_main_grad": {"head"},
    "_build_record": set(),
    "_processor": set(),
    "_extensions": {"_build_record"},
    "_native_arguments": {"_extensions"},
    "_native_rows": {"_native_arguments", "_processor"},
    "_native": {
        *("_extensions", "_native_arguments", "_native_rows", "_processor", "_rows", "head"),
    },
    "_torch": {"_rows", "device", "head"},
    "device": set(),
    "_cuda_kernels": {"_extensions", "_rows", "device"},
    "_triton": {"_cuda_kernels", "_rows", "device", "head"},
    "verification": {
        *("_bounds", "_cuda_kernels", "_rows", "_torch", "_triton", "device", "head", "reference"),
        "support",
    },
    "backends": {
        *("_cuda_kernels", "_native", "_rows", "_torch", "_triton", "device", "head"),
        "verification",
    },
    "ops": {"_cuda_kernels", "_native", "_rows", "_torch", "backends", "head"},
    "_radix": {"_torch", "backends", "distributed", "ops"},
    "entropy_threshold": {"_radix", "backends"},
    "top_entropy_mask": {"_radix", "backends"},
    "sampling": {"_native", "_torch", "_triton", "backends", "support"},
    "streaming_threshold": {"_radix", "backends", "distributed"},
    "entropy_control": {"distributed"},
    "options": {"backends", "loss_terms"},
    "_loss_options": {"losses", "options"},
    "_ragged": set(),
    "_loss_tokens": {"_loss_options", "_ragged"},
    "_ratio_kernel": {"_loss_tokens", "losses", "ops"},
    "ratio_loss": {
        *("_loss_options", "_loss_tokens", "_ratio_kernel", "backends", "loss_terms", "losses"),
        "options",
    },
    "_pair_products": {"_native", "_torch", "_triton"},
    "_support_head": {
        *("_pair_products", "_rows", "_torch", "distributed", "head", "support"),
    },
    "_vocab_parallel": {"_rows", "_torch", "backends", "distributed", "head", "ops"},
    "_token_ids": {"_rows", "head"},
    "_token_shared": {"_rows", "_token_ids", "_torch", "backends", "head"},
    "_token_pairs": {"_pair_products", "_rows", "_token_ids", "backends", "head"},
    "_token_logprobs": {
        *("_rows", "_token_ids", "_token_pairs", "_token_shared", "backends", "head", "ops"),
    },
    "linear_logprob_entropy": {
        *("_main_grad", "_rows", "_support_head", "_token_ids", "_token_logprobs"),
        *("_vocab_parallel", "backends", "head", "ops", "reference", "support", "verification"),
    },
    "high_entropy_policy_loss": {
        *("_loss_options", "_loss_tokens", "_main_grad", "_ragged", "_rows", "backends", "head"),
        *("linear_logprob_entropy", "options", "ratio_loss", "support", "top_entropy_mask"),
    },
    "nn": {"_loss_options", "head", "high_entropy_policy_loss", "options", "support"},
    "testing": {"_native", "_torch", "_triton", "backends", "ops", "verification"},
    "_bench": {
        *("_native", "backends", "head", "high_entropy_policy_loss", "linear_logprob_entropy"),
        *("options", "testing", "top_entropy_mask", "verification"),
    },
    "integrations": {
        *("_rows", "backends", "head", "high_entropy_policy_loss"),
        *("linear_logprob_entropy", "options", "ratio_loss", "sampling", "streaming_threshold"),
        *("support", "top_entropy_mask"),
    },
    "__main__": ANYTHING,
    "__init__": ANYTHING,
}
# integrations.hf is what knows the head of a model: a trainer that looked for it itself would be
# a second place to know it.
PUBLIC_MODULES = {"backends", "distributed", "integrations.hf", "nn", "reference", "testing"}
# What a trainer of vLLM's samples needs, which this one does too.
PUBLIC_MODULES |= {f"integrations.vllm{part}" for part in ("", "_processors", "_worker")}
PUBLIC_NAMES = {*entropy_kernels.__all__, *PUBLIC_MODULES, "__version__"}


def layer(path: Path) -> str:
    """The first name below the package: the module, or the folder a file lies in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Dotted names a file imports; `from a import b` gives a.b, and dots what they stand for."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*parents, *filter(None, [node.module])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def attributes(tree: ast.AST) -> Iterator[str]:
    """NAME of every entropy_kernels.NAME and ek.NAME that a file uses."""
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    for node in names:
        if isinstance(node.value, ast.Name) and node.value.id in ("ek", "entropy_kernels"):
            yield node.attr


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", python_files(PACKAGE), ids=relative)
def test_package_imports_only_lower_layers(path):
    own = layer(path)
    if own in EVERYWHERE:
        assert not [name for name in imports(path) if name.startswith("entropy_kernels")]
        return
    assert own in ALLOWED, f"{relative(path)} is in no layer: add it to ALLOWED"
    allowed = ALLOWED[own]
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] not in ("benchmarks", "trainer")
        if parts[0] == "entropy_kernels" and allowed is not ANYTHING:
            used = parts[1] if len(parts) > 1 else "the package itself"
            assert used in allowed | {own} | EVERYWHERE, (
                f"{own} imports {used}; allowed: {sorted(allowed)}"
            )


@pytest.mark.parametrize("path", python_files(PACKAGE), ids=relative)
def test_package_names_itself_by_dots(path):
    """So a copy under another name, as one from the Hub, imports nothing of an installed one."""
    absolute = re.findall(r"^ *(?:from|import) entropy_kernels\b.*", path.read_text(), re.M)
    assert not absolute, f"{relative(path)}: {absolute}"


@pytest.mark.parametrize("path", python_files(ROOT / "trainer"), ids=relative)
def test_trainer_uses_public_names_only(path):
    uses = attributes(ast.parse(path.read_text()))
    imported = {
        name.removeprefix("entropy_kernels.")
        for name in imports(path)
        if name.startswith("entropy_kernels.")
    }
    private = {
        name
        for name in imported | set(uses)
        if not any(name == public or name.startswith(f"{public}.") for public in PUBLIC_NAMES)
    }
    assert not private, f"{relative(path)} uses {sorted(private)}, which are not public"


def test_the_layers_have_no_cycle():
    done: set[str] = set()
    left = {name: allowed for name, allowed in ALLOWED.items() if allowed is not ANYTHING}
    while left:
        ready = {name for name, allowed in left.items() if allowed <= done}
        assert ready, f"a cycle among {sorted(left)}"
        done |= ready
        left = {name: allowed for name, allowed in left.items() if name not in ready}


def test_every_layer_is_a_module_and_every_arrow_is_used():
    """What the table allows and nothing does would hide the next import that should not be."""
    used: dict[str, set[str]] = {}
    for path in python_files(PACKAGE):
        parts = [name.split(".") for name in imports(path)]
        named = {x[1] for x in parts if x[0] == "entropy_kernels" and len(x) > 1}
        used.setdefault(layer(path), set()).update(named)
    assert not set(ALLOWED) - set(used), "of the table, and no module"
    unused = {
        own: sorted(allowed - used[own])
        for own, allowed in ALLOWED.items()
        if allowed is not ANYTHING and allowed - used[own]
    }
    assert not unused, f"allowed and unused: {unused}"
    assert not EVERYWHERE - set(used), "of EVERYWHERE, and no module"


def test_only_the_compiled_extensions_are_imported_by_name():
    """An editor follows every other import, from a public function to each kernel."""
    by_name = [path for path in python_files(PACKAGE) if "import_module(" in path.read_text()]
    assert [relative(path) for path in by_name] == ["entropy_kernels/_extensions.py"]


def test_csrc_includes_no_torch_header():
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        for header in ("torch", "ATen", "c10"):
            assert f"#include <{header}/" not in path.read_text(), f"{relative(path)}: {header}"


@pytest.mark.parametrize("path", python_files(PACKAGE / "_triton"), ids=relative)
def test_names_tell_launchers_kernels_and_device_functions_apart(path: Path):
    functions = [x for x in ast.parse(path.read_text()).body if isinstance(x, ast.FunctionDef)]
    decorators = [(x.name, ast.unparse(each)) for x in functions for each in x.decorator_list]
    jitted = [name for name, how in decorators if re.match(r"triton\.jit\b", how)]
    kernels = {name for name in jitted if name.endswith("_kernel")}
    private = {name for name in jitted if name.startswith("_")}
    if path.stem.endswith(("kernel", "kernels")):
        assert kernels
        assert set(jitted) == {x.name for x in functions} == kernels | private
    elif path.stem.endswith("_functions"):
        assert set(jitted) == {x.name for x in functions}
        assert not kernels
    else:
        assert not jitted
