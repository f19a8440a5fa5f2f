"""What the two packages export is documented, and each example runs (pytest collects doctests)."""

from __future__ import annotations

import doctest
import inspect
import re
from types import ModuleType

import pytest

import memtrans
import memtrans_kernels
from memtrans.training import checkpoint
from memtrans_kernels.backends import IMPLEMENTATIONS

PUBLIC = [
    *((memtrans, name) for name in memtrans.__all__),
    *((memtrans_kernels, name) for name in memtrans_kernels.__all__),
    (checkpoint, "save_checkpoint"),
    (checkpoint, "load_checkpoint"),
]


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=[f"{module.__name__}.{name}" for module, name in PUBLIC])
def test_a_public_name_has_an_example_that_doctest_finds(module: ModuleType, name: str) -> None:
    public = getattr(module, name)
    home = inspect.getmodule(public)
    found = {test.name: test for test in doctest.DocTestFinder().find(public, name, module=home)}
    assert name in found, "no docstring that a doctest runner would look into"
    assert found[name].examples


@pytest.mark.parametrize("name", [name for name in memtrans_kernels.__all__ if name in IMPLEMENTATIONS])
def test_an_operator_names_the_backends_that_it_has(name: str) -> None:
    documented = re.search(r"backend: one of (.*)\.", inspect.getdoc(getattr(memtrans_kernels, name)) or "")
    implemented = {candidate.backend for candidate in IMPLEMENTATIONS[name]}
    assert documented and set(re.findall(r"`(\w+)`", documented[1])) == {"auto", *implemented}


@pytest.mark.parametrize("package", [memtrans, memtrans_kernels])
def test_every_public_name_is_listed_once_and_in_order(package: ModuleType) -> None:
    assert package.__all__ == sorted(set(package.__all__))
