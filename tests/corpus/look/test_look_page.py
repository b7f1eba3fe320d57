"""The page of `megalm look` in a real browser, where there is one (chromium, and playwright to drive it)."""

import json

import pytest

from megalm.corpus.look.labels import Labels
from megalm.corpus.look.sample import sample_corpus
from megalm.corpus.look.search import Search
from megalm.corpus.look.server import LookServer
from megalm.corpus.look.view import make_view, render_page
from tests.generate.test_chat_page import BROWSER


@pytest.fixture
def opened(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    if not BROWSER:
        pytest.skip("no chromium is installed here")
    texts = [f"an ordinary sentence about apples, number {n}" for n in range(60)]
    texts[7] = "write to somebody@example.org about the only pear"
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sample = sample_corpus([str(tmp_path / "a.jsonl")], 100)
    view = make_view(sample, 3, None, 500)
    (tmp_path / "export.html").write_text(render_page(view, {}, live=False))
    server = LookServer(sample, view, Labels(tmp_path / "labels.jsonl"), Search(sample.files, "text", None))
    server.start()
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        page.problems = []
        page.on("console", lambda told: page.problems.append(told.text) if told.type == "error" else None)
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.goto(server.address)
        yield page, tmp_path
        browser.close()
    server.shutdown()
    server.server_close()


def search(page, words):
    page.fill("#query", words)
    page.click("#search")


def test_a_text_is_found_labelled_and_the_label_is_on_disk(opened):
    page, folder = opened
    assert page.inner_text("#count") == "60 of 60 documents of the sample"
    search(page, "pear")
    assert page.inner_text("#count") == "1 of 60 documents of the sample"
    assert page.locator(".card").count() == 1 and "somebody@example.org" in page.inner_text(".card")
    page.locator(".card").get_by_role("button", name="bad").click()
    page.locator(
        "#labelled", has_text="1"
    ).wait_for()  # no script of the test's: the page forbids what it did not bring
    (kept,) = (json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines())
    assert kept["label"] == "bad" and "pear" in kept["text"]
    page.click("#everything")
    page.wait_for_load_state("networkidle")
    for name in ("sources", "distributions", "clusters", "repeats"):
        page.click(f"#tab-{name}")
        assert page.inner_text("#main").strip()
    assert page.problems == []


def test_the_export_needs_no_server_and_saves_labels_as_a_file(opened):
    page, folder = opened
    page.goto((folder / "export.html").as_uri())
    search(page, "pear")
    page.locator(".card").get_by_role("button", name="good").click()
    with page.expect_download() as waiting:
        page.click("#save")
    kept = [json.loads(line) for line in waiting.value.path().read_text().splitlines()]
    assert [row["label"] for row in kept] == ["good"] and page.problems == []
