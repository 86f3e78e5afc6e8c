"""The live page in a real browser (Debian's Chromium), over `faasmoe up`: `make test-browser`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faasmoe_up import FaasmoeUp, running_up
from tiny_chat import save_tiny_chat_model

webdriver = pytest.importorskip("selenium.webdriver", reason="installed by `make test-browser`")
ui = pytest.importorskip("selenium.webdriver.support.ui")

pytestmark = pytest.mark.browser

AXE = Path(__file__).parent / "node_modules/axe-core/axe.min.js"
SCREENSHOTS = os.environ.get("SCREENSHOTS", "")  # folder to write them to; empty for none
TIMEOUT_S = 60
MIN_TOKENS = 64
PAGE_KEY, TENANT_KEY = "page-" + "k" * 32, "acme-" + "k" * 32


def write_model(folder: Path, **spec: Any) -> Path:
    model = save_tiny_chat_model(folder / "model", max_model_len=1024)
    document = {
        "apiVersion": "faasmoe.dev/v1alpha1",
        "kind": "MoEModel",
        "metadata": {"name": "tiny"},
        "spec": {
            "model": {"source": f"file://{model}"},
            "store": {"path": str(folder / "store")},
            "router": {"device": "cpu"},
            "experts": {"device": "cpu", "scaling": {"initialScale": 0, "minScale": 0}},
            "granularity": {"expertsPerFunction": 1},
            **spec,
        },
    }
    file = folder / "model.yaml"
    file.write_text(json.dumps(document))  # JSON is YAML
    return file


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaasmoeUp]:
    folder = tmp_path_factory.mktemp("page")
    options = ("--live-page-min-tokens", str(MIN_TOKENS))
    with running_up(write_model(folder), folder / "up.log", *options) as running:
        yield running


@pytest.fixture(scope="module")
def up_with_keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaasmoeUp]:
    """A model of the tenant acme, and a page with a key."""
    folder = tmp_path_factory.mktemp("keys")
    (folder / "acme").mkdir()
    (folder / "acme" / "key").write_text(TENANT_KEY)
    file = write_model(folder, tenants=[{"name": "acme", "apiKeysPath": str(folder / "acme")}])
    with running_up(file, folder / "up.log", "--live-page-key", PAGE_KEY) as running:
        yield running


@pytest.fixture(params=["light", "dark"])
def browser(request: pytest.FixtureRequest) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1100"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.binary_location = "/usr/bin/chromium"
    service = webdriver.ChromeService("/usr/bin/chromedriver")
    with webdriver.Chrome(options, service) as driver:
        scheme = {"name": "prefers-color-scheme", "value": request.param}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        driver.scheme = request.param
        yield driver


def wait_for(browser: Any, script: str) -> Any:
    """Return what a script returns, once that is true."""
    wait = ui.WebDriverWait(browser, TIMEOUT_S)
    return wait.until(lambda driver: driver.execute_script(f"return {script}"))


def test_the_heat_map_moves_while_one_chats(up: FaasmoeUp, browser: Any) -> None:
    browser.get(f"{up.base_url}/ui/")
    wait_for(browser, "document.querySelectorAll('#map rect').length === 8")
    assert browser.find_element("id", "connection").text == "live"
    message = browser.find_element("id", "message")
    message.clear()
    message.send_keys("the quick brown fox jumps over the lazy dog " * 4)
    message.submit()
    wait_for(browser, "document.querySelectorAll('#map rect.active').length > 0")
    wait_for(browser, "document.querySelectorAll('#waits dd').length === 4")
    assert wait_for(browser, "document.querySelectorAll('#events li').length")
    assert "s" in browser.find_element("css selector", "#waits dd").text
    if SCREENSHOTS:
        browser.save_screenshot(f"{SCREENSHOTS}/live-page-{browser.scheme}.png")
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []


def test_the_page_is_accessible(up: FaasmoeUp, browser: Any) -> None:
    browser.get(f"{up.base_url}/ui/")
    wait_for(browser, "document.querySelectorAll('#map rect').length === 8")
    browser.execute_script(AXE.read_text())
    found = browser.execute_async_script("axe.run().then(arguments[arguments.length - 1])")
    violations = [
        (entry["id"], [node["target"] for node in entry["nodes"]]) for entry in found["violations"]
    ]
    assert violations == []


def test_cells_are_reached_by_keyboard(up: FaasmoeUp, browser: Any) -> None:
    keys = webdriver.Keys
    browser.get(f"{up.base_url}/ui/")
    wait_for(browser, "document.querySelectorAll('#map rect').length === 8")
    browser.execute_script("document.getElementById('map').focus()")
    browser.switch_to.active_element.send_keys(keys.ARROW_DOWN, keys.ARROW_RIGHT, keys.ARROW_RIGHT)
    assert browser.find_element("id", "cell").text.startswith("Layer 1, block 2:")
    browser.switch_to.active_element.send_keys(keys.ARROW_DOWN)  # there is no layer 2
    assert browser.find_element("id", "cell").text.startswith("Layer 1, block 2:")


def test_only_the_pages_own_files_are_loaded(up: FaasmoeUp, browser: Any) -> None:
    browser.get(f"{up.base_url}/ui/")
    wait_for(browser, "document.querySelectorAll('#map rect').length === 8")
    loaded = browser.execute_script(
        "return performance.getEntriesByType('resource').map((r) => [r.name, r.decodedBodySize])"
    )
    assert all(name.startswith(up.base_url) for name, _ in loaded)
    assert sum(size for _, size in loaded) <= 200_000


def test_the_key_of_the_page_shows_all_tenants(up_with_keys: FaasmoeUp, browser: Any) -> None:
    browser.get(f"{up_with_keys.base_url}/ui/")
    wait_for(browser, "!document.getElementById('key-form').hidden")
    browser.find_element("id", "key").send_keys(PAGE_KEY)
    browser.find_element("css selector", "#key-form button").click()
    wait_for(browser, "document.querySelectorAll('#map rect').length === 8")
    browser.find_element("id", "api-key").send_keys(TENANT_KEY)
    browser.find_element("id", "message").submit()
    wait_for(browser, "document.querySelectorAll('#tenant dd').length === 4")
    wait_for(browser, "document.querySelectorAll('#tenants td').length >= 5")
    assert browser.find_element("css selector", "#tenants td").text == "acme"
    assert wait_for(browser, "document.querySelector('#sandboxes td:last-child')?.textContent")
