"""mkdocs' hook: pages made of files outside docs/, and links that lead to them there."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PACKAGES = ("memtrans", "memtrans_kernels")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that have no file in docs/."""
    from mkdocs.structure.files import File

    pages = {target: (ROOT / source).read_text(encoding="utf-8") for source, target in PAGES.items()}
    pages |= {f"reference/{package}.md": reference(ROOT / package) for package in PACKAGES}
    pages["examples.md"] = examples(ROOT / "docs" / "examples")
    for target, content in pages.items():
        files.append(File.generated(config, target, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links between files of the repository become links between pages; those to other files become plain text."""
    return LINK.sub(lambda link: relinked(*link.groups()), markdown)


def relinked(image: str, text: str, target: str) -> str:
    """A link as the site has it.

    >>> relinked("", "the log", "docs/log.md"), relinked("", "start", "../README.md#install")
    ('[the log](log.md)', '[start](index.md#install)')
    >>> relinked("", "the result", "../benchmarks/results/cpu/demo.json")
    'the result (`benchmarks/results/cpu/demo.json`)'
    """
    path, hash_sign, anchor = target.partition("#")
    if not path or "://" in target:
        return f"{image}[{text}]({target})"
    inside = path.removeprefix("../").removeprefix("docs/")
    inside = PAGES.get(inside, inside)
    if inside in PAGES.values() or (ROOT / "docs" / inside).is_file():
        return f"{image}[{text}]({inside}{hash_sign}{anchor})"
    return f"{text} (`{path.removeprefix('../')}`)"


def reference(package: Path) -> str:
    """A page with an entry for each public name of a package."""
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    names = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    )
    entries = [f"::: {package.name}.{name}" for name in names if not name.startswith("__")]
    return "\n\n".join([f"# {package.name}", ast.get_docstring(tree) or "", *entries]) + "\n"


def examples(folder: Path) -> str:
    """A page with each script of a folder."""
    parts = ["# Examples", "Each is a script that runs as it stands."]
    for script in sorted(folder.glob("*.py")):
        parts += [f"## {script.name}", f"```python\n{script.read_text(encoding='utf-8')}```"]
    return "\n\n".join(parts) + "\n"
