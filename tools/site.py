"""What `mkdocs build` makes pages of: the repository's Markdown files, each at its own path.

A hook of mkdocs.yml. Links between the files are then the same on the site and in the repository.
A file that a page links to is part of the site too. Each public name of the package gets a page,
written from its docstring.
"""

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "entropy_kernels"
PAGES = ("*.md", "docs/**/*.md", "benchmarks/**/README.md")
# Public by their path; all other public names are in `entropy_kernels.__all__`.
MODULES: tuple[str, ...] = (
    *("distributed", "integrations.hf", "integrations.liger", "integrations.trl"),
    *("integrations.verl", "reference", "testing"),
)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Replaces the files of docs/ by those of the repository and the pages of the API."""
    for file in list(files):
        if file.abs_src_path and Path(file.abs_src_path).is_relative_to(ROOT / "docs"):
            files.remove(file)
    pages = sorted({path for pattern in PAGES for path in ROOT.glob(pattern)})
    for path in sorted({*pages, *(target for page in pages for target in targets(page))}):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    api = {f"api/{name}.md": module for name, module in sorted(public_names().items())}
    for name, module in api.items():
        text = f"# {module.removeprefix('entropy_kernels.')}\n\n::: {module}\n"
        files.append(File.generated(config, name, content=text))
    config["nav"] = [
        entry if entry != {"API": "api/"} else {"API": [*api]} for entry in config["nav"]
    ]
    return files


def targets(page: Path) -> list[Path]:
    """Files of the repository that a page links to or shows."""
    found = (page.parent / link for link in LINK.findall(page.read_text()))
    inside = (path.resolve() for path in found if path.is_file())
    return [path for path in inside if path.is_relative_to(ROOT)]


def public_names() -> dict[str, str]:
    """Where each public name of the package is defined, by dotted path."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = ("entropy_kernels", *filter(None, [node.module]))
            found.update({alias.name: ".".join((*parts, alias.name)) for alias in node.names})
    (exported,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and "__all__" in map(ast.unparse, node.targets)
    )
    return {name: found[name] for name in exported} | {
        name: f"entropy_kernels.{name}" for name in MODULES
    }
