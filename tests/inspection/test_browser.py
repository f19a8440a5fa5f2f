"""The page in a real browser: it shows, it listens to clicks and keys, it asks nothing and says nothing.

Needs Debian's chromium and chromium-driver, and selenium, which `make test-slow` installs.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.pages import FACT, PLANTED, records

from memtrans.inspection.page import write_page

pytestmark = [pytest.mark.slow, pytest.mark.cpu, pytest.mark.timeout(300)]
WIDE, NARROW = (1280, 900), (420, 800)


def missing() -> list[str]:
    """Packages that have to be installed first, by the command that does it."""
    needed = (
        [] if shutil.which("chromium") and shutil.which("chromedriver") else ["apt install chromium chromium-driver"]
    )
    return needed + ([] if importlib.util.find_spec("selenium") else ["pip install selenium"])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if wanted := missing():
        pytest.fail(f"the page cannot be tried without: {'; '.join(wanted)}")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(path, records())
    return path


def opened(browser: Any, page: Path, size: tuple[int, int] = WIDE, dark: bool = False) -> Any:
    width, height = size
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for log in ("browser", "performance"):
        browser.get_log(log)  # of the page before
    browser.get(page.as_uri())
    return browser


def texts(browser: Any, selector: str) -> list[str]:
    return [element.get_property("textContent") for element in browser.find_elements("css selector", selector)]


def test_a_click_shows_where_a_word_came_from(browser: Any, page: Path) -> None:
    opened(browser, page)
    assert texts(browser, "#token") == ["␣fact19"]  # the one that came from the memory most
    browser.find_element("id", "t7").click()
    assert texts(browser, "#token") == ["␣fact7"]
    assert texts(browser, ".passage mark") == ["␣fact7↵"]
    assert len(browser.find_elements("css selector", ".passage mark wbr")) == 1  # marked words in a row can be broken
    assert texts(browser, "[aria-selected=true]") == ["fact7"]
    around = texts(browser, ".passage")[0]
    assert f"word{FACT - 190}" in around and f"word{FACT + 200}" in around and f"word{FACT + 230}" not in around
    assert texts(browser, "#usual li mark") == ["␣word11"]
    assert len(browser.find_elements("css selector", "#strip .pin")) == 1
    browser.find_element("id", "on").click()
    assert texts(browser, "#token") == ["␣fact8"]


def test_it_opens_with_the_word_that_came_from_the_memory_most(browser: Any, tmp_path: Path) -> None:
    """A line's end and a comma are no words."""
    whole, path = records(), tmp_path / "page.html"
    *words, one, other = whole.written
    write_page(path, replace(whole, written=[*words, replace(one, text="\n"), replace(other, text=",")]))
    opened(browser, path)
    assert texts(browser, "#token") == ["␣fact17"]


def test_keys_go_from_word_to_word(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    opened(browser, page)
    body = browser.find_element("tag name", "body")
    for keys, word in ((Keys.HOME, "fact0"), (Keys.RIGHT * 2, "fact2"), (Keys.LEFT, "fact1"), (Keys.END, "fact19")):
        body.send_keys(keys)
        assert texts(browser, "#token") == ["␣" + word]
    body.send_keys(Keys.RIGHT)  # there is none behind the last
    assert texts(browser, "#token") == ["␣fact19"]
    browser.find_element("id", "text").send_keys(Keys.LEFT)
    assert browser.find_element("id", "text").get_attribute("aria-activedescendant") == "t18"


def test_layers_and_heads_are_shown_on_demand(browser: Any, page: Path) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    opened(browser, page)
    assert not browser.find_element("id", "entries").is_displayed()
    browser.find_element("css selector", "#layers summary").click()
    WebDriverWait(browser, 10).until(lambda browser: texts(browser, "#bars button"))  # drawn a moment later
    assert texts(browser, "#bars button") == ["layer 062\u202f%", "layer 262\u202f%"]
    rows = texts(browser, "#entries tr td:nth-child(2)")
    assert rows[0] == str(FACT + 19) and 1 < len(rows) <= 16
    browser.find_elements("css selector", "#bars button")[1].click()
    assert texts(browser, "#layer") == ["layer 2,"]
    browser.find_element("css selector", "#heads option[value='2']").click()
    assert texts(browser, "#entries tr td:nth-child(3)")[0] == "51\u202f%"
    assert len(texts(browser, "#entries tr")) < len(rows)


def test_it_asks_nothing_says_nothing_and_shows_markup_as_text(browser: Any, page: Path) -> None:
    opened(browser, page)
    browser.find_element("id", "t3").click()
    shown = "␣" + PLANTED.replace(" ", "␣")
    assert texts(browser, "#token") == [shown] and texts(browser, ".passage mark")[0] == shown
    assert texts(browser, "h1")[0] == f"What {PLANTED} model remembered of a {PLANTED} book"
    assert browser.find_elements("tag name", "img") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if url not in (page.as_uri(), "data:,")] == []
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_it_fits_its_window_in_light_and_dark(browser: Any, page: Path, size: tuple[int, int], dark: bool) -> None:
    opened(browser, page, size, dark)
    for summary in browser.find_elements("tag name", "summary"):
        summary.click()
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
    paper, ink = (_light(browser, name) for name in ("background-color", "color"))
    assert paper < 0.2 < 0.7 < ink if dark else ink < 0.2 < 0.7 < paper


def _light(browser: Any, name: str) -> float:
    colour = browser.find_element("tag name", "body").value_of_css_property(name)
    return sum(float(part) for part in colour.split("(")[1].rstrip(")").split(",")[:3]) / (3 * 255)


def test_shares_show_without_colour(browser: Any, page: Path) -> None:
    opened(browser, page)
    lines = [
        float(element.value_of_css_property("border-bottom-width").removesuffix("px"))
        for element in browser.find_elements("css selector", "#text .t")
    ]
    assert lines == sorted(lines) and len(set(lines)) == 4


@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_a_long_text_opens_at_its_title_with_the_chosen_word_in_sight(
    browser: Any, tmp_path: Path, size: tuple[int, int]
) -> None:
    path = tmp_path / "page.html"
    write_page(path, records(tokens=256))
    opened(browser, path, size)
    assert texts(browser, "#token") == ["␣fact255"]  # the last word, far below
    top, bottom = browser.execute_script(
        "const box = document.querySelector('[aria-selected=true]').getBoundingClientRect();"
        "return [box.top, box.bottom]"
    )
    assert browser.execute_script("return window.scrollY") == 0
    assert 0 < top < bottom <= size[1]


def test_a_document_of_a_million_tokens_opens_in_a_second(browser: Any, tmp_path: Path) -> None:
    """The quickest of three times: the machine may have other work."""
    path = tmp_path / "page.html"
    write_page(path, records(tokens=256, document=1_000_000, layers=8))
    milliseconds = []
    for _ in range(3):
        opened(browser, path)
        assert texts(browser, "#token") == ["␣fact255"]
        milliseconds.append(browser.execute_script("return performance.getEntriesByType('navigation')[0].duration"))
    assert 0 < min(milliseconds) < 1000
