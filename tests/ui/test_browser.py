"""The pages in a browser: by keyboard, on a phone, with and without JavaScript, and nothing that the policy blocks."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect, sync_playwright

from evertune.live.staging import claim
from evertune.registry.registry import Registry
from evertune.serve.listening import config_of, listen
from evertune.serve.settings import ServerSettings
from evertune.ui.app import application
from evertune.ui.settings import UiSettings
from tests.helpers.shown import news, queue
from tests.ui.test_pages import PAGES, plan, steps

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no browser (apt-get install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return news(tmp_path)


@pytest.fixture
def url(registry: Registry, tmp_path: Path) -> Iterator[str]:
    settings = UiSettings(
        registry=registry.store.root,
        allow_changes=True,
        live="live.yaml",
        queue=str(queue(tmp_path / "queue.jsonl")),
    )
    where, app = ServerSettings(port=0), application(settings)
    with listen(where) as listening:
        server = uvicorn.Server(config_of(app, where, 10.0))  # ours handles signals, which only a main thread can
        app.state.is_ending = lambda: server.should_exit
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page of a desktop; whatever its console complains of, such as a blocked style, fails the test."""
    context = browser.new_context()
    made, complaints = context.new_page(), list[str]()
    made.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    made.on("pageerror", lambda error: complaints.append(str(error)))
    yield made
    context.close()
    assert not complaints


def focused(page: Page) -> str:
    return str(page.evaluate("document.activeElement.textContent.trim()"))


def test_by_keyboard(page: Page, url: str) -> None:
    page.goto(url)
    page.keyboard.press("Tab")
    assert focused(page) == "Skip to content"
    expect(page.locator(".skip")).to_be_in_viewport()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert focused(page).startswith("Roll back to version 1"), "the first link of the content"
    page.goto(url)
    for _ in range(6):
        page.keyboard.press("Tab")
    assert focused(page) == "Quarantine"
    page.keyboard.press("Enter")
    expect(page.locator("nav [aria-current=page]")).to_have_text("Quarantine")
    expect(page.locator(".headline")).to_contain_text("4 records are in quarantine")


def test_promote_with_confirmation_by_keyboard(page: Page, url: str, registry: Registry) -> None:
    page.goto(f"{url}/versions/4")
    page.get_by_role("link", name="Put into production").press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Put version 4 into production?")
    assert registry.aliases["production"] == 2, "nothing has changed yet"
    page.get_by_label("Reason").fill("it is better")
    page.keyboard.press("Tab")
    assert focused(page) == "Put version 4 into production"
    page.keyboard.press("Enter")
    page.wait_for_url(f"{url}/versions/4")
    expect(page.locator(".standing .state")).to_have_text("in production")
    assert registry.aliases == {"production": 4, "previous": 2}
    assert registry.events[-1]["reason"] == "it is better"
    page.get_by_role("link", name="Roll back to version 2").click()
    page.get_by_role("button", name="Put version 2 back").click()
    page.wait_for_url(f"{url}/")
    assert registry.aliases["production"] == 2


def test_a_refused_version_asks_for_a_second_word(page: Page, url: str, registry: Registry) -> None:
    page.goto(f"{url}/versions/3/promote")
    button = page.get_by_role("button", name="Put version 3 into production")
    button.click()
    assert registry.aliases["production"] == 2, "the browser asks for the box to be ticked"
    page.get_by_label("Promote it all the same").check()
    button.click()
    page.wait_for_url(f"{url}/versions/3")
    assert registry.aliases["production"] == 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_never_scrolls_sideways(browser: Browser, url: str, registry: Registry, scheme: str) -> None:
    plan().save(registry.store.local("staging"))
    context = browser.new_context(
        viewport={"width": 360, "height": 740}, color_scheme=scheme, is_mobile=True, has_touch=True
    )
    page, backgrounds = context.new_page(), set[str]()
    for path in [*PAGES, "/versions/4/promote", "/versions/3/promote", "/rollback", "/none"]:
        page.goto(f"{url}{path}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, path
        assert page.evaluate("Math.min(...[...document.querySelectorAll('a, button')].map(e => e.textContent.length))")
        backgrounds.add(str(page.evaluate("getComputedStyle(document.body).backgroundColor")))
    context.close()
    assert backgrounds == {"rgb(246, 247, 246)" if scheme == "light" else "rgb(14, 17, 19)"}


def test_every_page_keeps_to_the_policy(page: Page, url: str) -> None:
    for path in PAGES:
        page.goto(f"{url}{path}")
        assert page.evaluate("getComputedStyle(document.querySelector('main')).maxWidth") == "1080px", "styled"
        assert page.get_by_role("heading", level=1).count() == 1


def test_an_update_is_seen_as_it_goes_on(page: Page, url: str, registry: Registry) -> None:
    page.goto(f"{url}/update")
    expect(page.locator(".headline")).to_have_text("No update is in progress.")
    plan().save(registry.store.local("staging"))
    expect(page.locator(".headline")).to_have_text("Update 5 was interrupted while preparing")
    with registry.lease("evertune watch"):
        expect(page.locator(".stages [aria-current]")).to_have_text("preparing")
        claim(registry.store.local("staging"), plan())
        steps(registry, 120)
        expect(page.locator("progress")).to_have_attribute("value", "120")
        steps(registry, 240)
        expect(page.locator("progress")).to_have_attribute("value", "240")


def test_without_javascript_everything_can_be_read_and_done(browser: Browser, url: str, registry: Registry) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    plan().save(registry.store.local("staging"))
    page.goto(f"{url}/update")
    expect(page.locator(".headline")).to_have_text("Update 5 was interrupted while preparing")
    assert page.locator("noscript meta[http-equiv=refresh]").count() or "refresh" in page.content()
    page.goto(f"{url}/review")
    page.get_by_role("button", name="As suggested").first.click()
    expect(page.locator(".headline")).to_have_text("1 of 3 records have a label")
    page.goto(f"{url}/rollback")
    page.get_by_role("button", name="Put version 1 back").click()
    page.wait_for_url(f"{url}/")
    assert registry.aliases["production"] == 1
    context.close()
