"""The page of `megalm chat --web` in a real browser, where there is one (chromium, and playwright to drive it)."""

import re
import shutil

import pytest

from megalm.generate.chat import Speaker
from megalm.generate.model import load_model, open_tokenizer
from megalm.generate.server import ChatServer
from tests.convert.chat_model import make_chat_model

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)


@pytest.fixture
def page(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    if not BROWSER:
        pytest.skip("no chromium is installed here")
    make_chat_model(tmp_path, "string")
    source, model = load_model(tmp_path)
    server = ChatServer(Speaker(source, model, open_tokenizer(source)))
    server.start()
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        page.problems = []
        page.on("console", lambda told: page.problems.append(told.text) if told.type == "error" else None)
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.goto(server.address)
        yield page
        browser.close()
    server.shutdown()
    server.server_close()


def send(page, text):
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.wait_for_selector(".assistant[data-done]:last-child, .error", timeout=30_000)


def test_a_message_is_answered_again_and_forgotten(page):
    page.click("summary")
    page.fill("#max_tokens", "8")
    page.fill("#seed", "4")
    send(page, "what is it?")
    first = page.inner_text(".assistant")
    assert first and page.inner_text(".user") == "what is it?"
    page.fill("#seed", "5")
    page.click("#again")
    page.wait_for_selector(".assistant[data-done]", timeout=30_000)
    assert page.locator(".assistant").count() == 1 and page.inner_text(".assistant") != first
    page.click("#clear")
    assert page.locator(".message").count() == 0
    assert page.problems == []


def test_an_answer_is_stopped(page):
    page.click("summary")
    page.fill("#max_tokens", "100000")
    page.fill("#temperature", "1.5")
    page.fill("#text", "write")
    page.click("#send")
    some = page.locator(".assistant", has_text=re.compile(r".{4}", re.DOTALL))
    some.first.wait_for(timeout=30_000)  # no script of the test's: the page allows none
    page.dispatch_event("#stop", "click")  # the answer may have come to its end by now: then the button does nothing
    page.wait_for_selector(".assistant[data-done]", timeout=30_000)
    assert page.is_enabled("#send") and page.problems == []


def test_what_is_wrong_is_said_on_the_page(page):
    page.click("summary")
    page.fill("#temperature", "-1")
    send(page, "hello")
    assert "temperature is -1" in page.inner_text(".error")
