"""The rest of the package neither needs transformers nor imports it."""

from __future__ import annotations

import ast
import subprocess
import sys

from helpers.separate import ROOT

BLOCKED = "import sys; sys.modules['transformers'] = None\n"


def test_nothing_outside_imports_transformers() -> None:
    importing = []
    for path in [*ROOT.glob("memtrans/**/*.py"), *ROOT.glob("memtrans_kernels/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] in ("transformers", "tokenizers", "peft", "accelerate") for name in names):
                importing.append(path.relative_to(ROOT).parts[:2])
    assert set(importing) == {("memtrans", "hf")}


def test_without_transformers_an_error_names_the_extra() -> None:
    program = BLOCKED + "import memtrans\ntry:\n    import memtrans.hf\nexcept ImportError as error:\n    print(error)"
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "memtrans.hf needs transformers 5 or newer: pip install 'memtrans[hf]'"


def test_the_command_line_says_so_too() -> None:
    program = BLOCKED + "from memtrans.cli.main import main\nsys.exit(main(['hf', '--model', '.', '--document', 'x']))"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.strip().endswith("pip install 'memtrans[hf]'") and "Traceback" not in ended.stderr
