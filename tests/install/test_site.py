"""The site's pages: what they are made of, and where their links lead."""

from __future__ import annotations

import doctest

import pytest

import memtrans
from building import site


def test_the_examples_of_the_hook_hold() -> None:
    assert doctest.testmod(site).failed == 0


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("CONTRIBUTING.md", "[text](contributing.md)"),
        ("docs/faq.md#saving", "[text](faq.md#saving)"),
        ("#limits", "[text](#limits)"),
        ("https://example.org/x.md", "[text](https://example.org/x.md)"),
        ("docs/images", "text (`docs/images`)"),
    ],
)
def test_a_link_leads_to_a_page_or_is_text(target: str, expected: str) -> None:
    assert site.LINK.sub(lambda link: site.relinked(*link.groups()), f"[text]({target})") == expected


def test_the_reference_has_every_public_name() -> None:
    page = site.reference(site.ROOT / "memtrans")
    assert [line for line in page.splitlines() if line.startswith(":::")] == [
        f"::: memtrans.{name}" for name in memtrans.__all__
    ]
