"""The rest of the package neither needs transformers nor imports it."""

from __future__ import annotations

import ast
import subprocess
import sys

from helpers.separate import ROOT

BLOCKED = "import sys; sys.modules['transformers'] = None\n"


def test_nothing_outside_imports_transformers() -> None:
    allowed = {
        **{name: {("memtrans", "hf")} for name in ("transformers", "peft", "accelerate")},
        "tokenizers": {("memtrans", "data")},
    }
    importing: dict[str, set[tuple[str, ...]]] = {name: set() for name in allowed}
    for path in [*ROOT.glob("memtrans/**/*.py"), *ROOT.glob("memtrans_kernels/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for package in {name.split(".")[0] for name in names} & allowed.keys():
                importing[package].add(path.relative_to(ROOT).parts[:2])
    assert importing["transformers"]
    assert all(importing[package] <= places for package, places in allowed.items()), importing


def test_without_transformers_an_error_names_the_extra() -> None:
    program = BLOCKED + "import memtrans\ntry:\n    import memtrans.hf\nexcept ImportError as error:\n    print(error)"
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "memtrans.hf needs transformers 5 or newer: pip install 'memtrans[hf]'"


def test_the_command_line_says_so_too() -> None:
    program = BLOCKED + "from memtrans.cli.main import main\nsys.exit(main(['hf', '--model', '.', '--document', 'x']))"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.strip().endswith("pip install 'memtrans[hf]'") and "Traceback" not in ended.stderr
