"""The page in a real browser."""

import json
import re
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from miniglm.generation import Sampling
from tests.helpers import dialogue
from tests.served import expected, serving, wait_until, write_models

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
# a picture of one red pixel
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108020000009077"
    "53de0000000c49444154789c63f8cfc0000003010100c9fe92ef0000000049454e44ae426082"
)
LENGTH = 40  # tokens of most answers here

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs chromium; on Debian: apt-get install chromium"
)


@pytest.fixture(scope="module")
def out_dirs(tmp_path_factory):
    out_dirs = write_models(tmp_path_factory.mktemp("models"))
    (out_dirs["answers"] / "curves.png").write_bytes(PIXEL)
    (out_dirs["answers"] / "secret.png").symlink_to(Path(__file__).parents[2] / "docs/curves.png")
    evaluation = {"dataset": "data", "rouge_l": 0.25, "bits_per_byte": 2.5, "split": "<b>val</b>"}
    for name in ("evaluation.json", "evaluation-data-val.json"):
        (out_dirs["answers"] / name).write_text(json.dumps(evaluation), encoding="utf-8")
    return out_dirs


@pytest.fixture(scope="module")
def served(out_dirs):
    with serving([*out_dirs.values()]) as (address, servers):
        yield address, servers


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


def open_page(browser: Browser, address: str, width: int = 1280) -> Page:
    """A page of its own, whose requests' addresses are kept in page.asked."""
    page = browser.new_context(viewport={"width": width, "height": 844}).new_page()
    page.set_default_timeout(15000)
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("#question textarea")
    set_drawer(page, 2, LENGTH)
    return page


@pytest.fixture
def page(browser, served):
    page = open_page(browser, served[0])
    yield page
    page.context.close()


def set_drawer(page: Page, number: int, value: float) -> None:
    """Settings: 0 temperature, 1 top-p, 2 length, 3 penalty, 5 samples."""
    drawer = page.locator("#settings")
    field = drawer.locator("input[type=number]").nth(number)
    if not field.is_visible():
        drawer.get_by_text("设置 Settings").click()
    # a page that is still being built drops what is typed; the slider shows what it has taken
    slider = drawer.locator("input[type=range]").nth(number if number < 4 else 4)

    def taken() -> bool:
        field.fill(str(value))
        field.press("Tab")
        page.wait_for_timeout(100)
        return slider.input_value() == str(value)

    wait_until(taken)


def send(page: Page, text: str) -> None:
    page.fill("#question textarea", text)
    page.click("#send")


def finished(page: Page, count: int = 1) -> list[str]:
    """The texts of the last turn's answers, once they are whole."""
    marks = page.locator(".turn").last.locator(".marks")
    expect(marks).to_have_count(count)
    return page.locator(".turn").last.locator(".new").all_text_contents()


def ask(page: Page, text: str, count: int = 1) -> list[str]:
    turns = page.locator(".turn").count()
    send(page, text)
    expect(page.locator(".turn")).to_have_count(turns + 1)
    return finished(page, count)


def answer(out_dir: Path, text: str, number: int = 0, **options) -> str:
    sampling = Sampling(**{"max_new_tokens": LENGTH, "temperature": 0.3} | options)
    return expected(out_dir, dialogue(text), sampling, number)


# --- asking ------------------------------------------------------------------------------------


def test_an_answer_grows_and_is_that_of_sample_py(page, out_dirs):
    set_drawer(page, 2, 400)
    send(page, "谁弄权")
    growing = page.locator(".turn .new")
    lengths = []
    while not page.locator(".marks").count():
        lengths.append(len(growing.first.text_content()) if growing.count() else 0)
    assert len(set(lengths)) > 2  # it came piece by piece
    assert lengths == sorted(lengths)
    assert finished(page) == [answer(out_dirs["answers"], "谁弄权？", max_new_tokens=400)]
    assert page.locator(".bubble").text_content() == "谁弄权？"  # completed as in training
    assert page.locator("#question textarea").input_value() == ""


def test_stop_keeps_what_came_and_again_asks_anew(page, out_dirs, served):
    set_drawer(page, 2, 20000)
    send(page, "谁弄权？")
    page.wait_for_function("document.querySelector('.turn .new')?.textContent.length > 30")
    page.click("#stop")
    expect(page.locator(".note")).to_have_text("已停止 stopped")
    [text] = finished(page)
    whole = answer(out_dirs["answers"], "谁弄权？", max_new_tokens=400)
    assert len(text) > 30
    assert whole.startswith(text[: len(whole)])
    assert not served[1]["answers"].jobs
    set_drawer(page, 2, LENGTH)
    for attempt in (1, 2):
        page.click("#again")
        again = answer(out_dirs["answers"], "谁弄权？", 5 * attempt)
        expect(page.locator(".new")).to_have_text(again)
    assert page.locator(".turn").count() == 1


def test_several_samples_stand_side_by_side(page, out_dirs):
    set_drawer(page, 5, 3)
    set_drawer(page, 0, 1)
    texts = ask(page, "帝御何殿？", 3)
    alone = [answer(out_dirs["answers"], "帝御何殿？", n, temperature=1) for n in range(3)]
    assert texts == alone
    assert len(set(texts)) == 3
    boxes = [card.bounding_box() for card in page.locator(".card").all()]
    assert len({box["y"] for box in boxes}) == 1


def test_turns_stay_and_are_given_to_the_model_where_wanted(page, out_dirs):
    [first] = ask(page, "谁弄权？")
    assert ask(page, "帝御何殿？") == [answer(out_dirs["answers"], "帝御何殿？")]
    page.click("#clear")
    expect(page.locator(".turn")).to_have_count(0)
    page.get_by_label("接上文 Follow").check()
    assert ask(page, "谁弄权？") == [first]
    given = dialogue("谁弄权？", first, "帝御何殿？")
    sampling = Sampling(max_new_tokens=LENGTH, temperature=0.3)
    assert ask(page, "帝御何殿？") == [expected(out_dirs["answers"], given, sampling)]
    assert page.locator(".bubble").all_text_contents() == ["谁弄权？", "帝御何殿？"]


def test_clear_stops_what_runs(page, served):
    set_drawer(page, 2, 20000)
    send(page, "谁弄权？")
    page.wait_for_function("document.querySelector('.turn .new')?.textContent.length > 10")
    page.click("#clear")
    expect(page.locator(".turn")).to_have_count(0)
    wait_until(lambda: not served[1]["answers"].jobs)
    set_drawer(page, 2, 5)
    expect(page.locator("#stop")).to_be_disabled()
    assert ask(page, "帝御何殿？")


def choose_model(page: Page, where: str, name: str) -> None:
    page.locator(f"{where} input").first.click()
    page.get_by_role("option", name=name, exact=True).click()


def test_another_model_says_what_it_is_and_continues(page, out_dirs):
    facts = page.locator(".facts")
    expect(facts).to_contain_text("问答 answers")
    expect(facts).to_contain_text("0.04M 参数")
    expect(facts).to_contain_text("unseen 0.250")
    choose_model(page, "#model", "novel")
    expect(facts).to_contain_text("续写 continues")
    field = page.locator("#settings input[type=number]").first
    expect(field).to_have_value("0.8")
    assert ask(page, "却说曹操") == [answer(out_dirs["novel"], "却说曹操", temperature=0.8)]
    assert page.locator(".card .text").text_content().count("却说曹操") == 1
    assert not page.locator(".bubble").count()


def test_two_pages_at_once_get_their_own_texts(browser, page, out_dirs, served):
    other = open_page(browser, served[0])
    asked = {page: "谁弄权？", other: "殿角如何？"}
    for each, text in asked.items():
        set_drawer(each, 2, 300)
        send(each, text)
    for each, text in asked.items():
        assert finished(each) == [answer(out_dirs["answers"], text, max_new_tokens=300)]
    other.context.close()


def test_a_page_that_is_closed_is_not_answered_further(browser, served):
    page = open_page(browser, served[0])
    set_drawer(page, 2, 20000)
    send(page, "谁弄权？")
    page.wait_for_function("document.querySelector('.turn .new')?.textContent.length > 10")
    assert served[1]["answers"].jobs
    page.context.close()
    wait_until(lambda: not served[1]["answers"].jobs)


# --- marks -------------------------------------------------------------------------------------


def test_marks_become_lines_of_preference_data(page, out_dirs):
    file = out_dirs["answers"] / "marks.jsonl"
    file.unlink(missing_ok=True)
    [text] = ask(page, "谁弄权")
    page.locator(".mark.chosen").click()
    expect(page.locator(".mark.chosen.on")).to_be_disabled()
    expect(page.locator(".mark.rejected")).to_be_disabled()
    choose_model(page, "#model", "novel")
    [more] = ask(page, "却说")
    page.locator(".turn").last.locator(".mark.rejected").click()
    expect(page.locator(".mark.rejected.on")).to_be_visible()
    assert file.read_text(encoding="utf-8").count("\n") == 1
    question = {"prompt": dialogue("谁弄权？"), "chosen": text}
    assert json.loads(file.read_text(encoding="utf-8")) == question
    continued = json.loads((out_dirs["novel"] / "marks.jsonl").read_text(encoding="utf-8"))
    assert continued == {"prompt": "却说", "rejected": more}


# --- the other tabs ----------------------------------------------------------------------------


def test_two_models_are_compared_on_one_prompt(page, out_dirs):
    page.get_by_role("tab", name="比较").click()
    page.fill("#compare-text textarea", "董卓")
    page.click("#compare-run")
    expect(page.locator("#compare-log .note")).to_have_text(["到长度上限 cut at length"] * 2)
    texts = page.locator("#compare-log .new").all_text_contents()
    assert texts == [
        answer(out_dirs["answers"], "董卓？"),
        answer(out_dirs["novel"], "董卓", temperature=0.8),
    ]
    assert page.locator("#compare-log .given").all_text_contents() == ["", "董卓"]


def test_what_one_model_cannot_read_the_other_still_continues(page, out_dirs):
    text = "却说" * 700
    page.get_by_role("tab", name="Compare").click()
    page.fill("#compare-text textarea", text)
    page.click("#compare-run")
    cards = page.locator("#compare-log .card")
    expect(cards.nth(0).locator(".error")).to_contain_text("longer than block_size")
    sampling = Sampling(LENGTH, temperature=0.8)
    wanted = expected(out_dirs["novel"], dialogue(text), sampling)
    expect(cards.nth(1).locator(".new")).to_have_text(wanted)
    expect(page.locator("#compare-log .caret")).to_have_count(0)


def test_certainty_shades_tokens_by_their_probability(page, out_dirs):
    page.get_by_role("tab", name="把握").click()
    page.fill("#certainty-text textarea", "谁弄权？")
    page.click("#certainty-run")
    page.wait_for_selector(".tip", state="attached")
    tokens = page.locator(".tok")
    shown = "".join(token.evaluate("t => t.firstChild.data") for token in tokens.all())
    assert shown == answer(out_dirs["answers"], "谁弄权？")
    probs = [float(token.get_attribute("data-prob")) for token in tokens.all()]
    assert all(0 < prob <= 1 for prob in probs)
    surest, least = probs.index(max(probs)), probs.index(min(probs))
    hue = "t => +t.style.background.match(/rgba?\\((\\d+), (\\d+)/)[2]"  # green
    assert tokens.nth(surest).evaluate(hue) > tokens.nth(least).evaluate(hue)
    tokens.nth(least).hover()
    tip = tokens.nth(least).locator(".tip")
    expect(tip).to_be_visible()
    percents = tip.locator("em").all_text_contents()
    assert len(percents) >= 5
    assert all(re.fullmatch(r"<?\d+\.\d%", text) for text in percents)


def test_the_run_tab_has_evaluation_and_the_pictures_of_the_out_dir_alone(page):
    page.get_by_role("tab", name="训练").click()
    report = page.locator("#report")
    expect(report).to_contain_text("0.250")
    expect(report).to_contain_text("<b>val</b>")
    assert report.locator("img").count() == 1  # secret.png is a link to elsewhere
    assert report.locator("img").evaluate("picture => picture.naturalWidth") == 1
    choose_model(page, "#model", "novel")
    expect(report).to_contain_text("not evaluated yet")


# --- text is text ------------------------------------------------------------------------------

NASTY = (
    "<img src=x onerror=window.hacked=1><script>window.hacked=1</script> **粗** "
    "[a](http://evil.example) ![b](http://evil.example/x.png) $$x$$ ${window.hacked=1} {{value}}"
)


@pytest.mark.parametrize("tab", ["chat", "compare", "certainty"])
def test_html_and_markdown_are_shown_as_text(page, tab):
    choose_model(page, "#model", "novel")
    if tab == "chat":
        ask(page, NASTY)
    else:
        page.get_by_role("tab", name={"compare": "比较", "certainty": "把握"}[tab]).click()
        page.fill(f"#{tab}-text textarea", NASTY)
        page.click(f"#{tab}-run")
    log = page.locator("#log" if tab == "chat" else f"#{tab}-log")
    expect(log.locator(".given", has_text="<img")).to_have_text(NASTY)
    assert not log.locator("img, script, a, strong, .katex").count()
    assert page.evaluate("window.hacked") is None
    assert not [url for url in page.asked if "evil" in url]


def test_a_question_of_100000_characters_gets_a_message(page, out_dirs):
    send(page, "问" * 99_999)
    expect(page.locator(".error")).to_contain_text("100,000 characters; this model reads 96 tokens")
    assert len(page.locator(".bubble").text_content()) < 1100
    assert ask(page, "谁弄权？") == [answer(out_dirs["answers"], "谁弄权？")]
    page.get_by_role("tab", name="把握").click()
    page.fill("#certainty-text textarea", "问" * 99_999)
    page.click("#certainty-run")
    expect(page.locator("#certainty-log .error")).to_contain_text("100,000 characters")


# --- without a network, on a phone -------------------------------------------------------------


def test_nothing_is_asked_of_another_host(page, served):
    ask(page, "谁弄权？")
    for tab in ("比较", "把握", "训练"):
        page.get_by_role("tab", name=tab).click()
    assert {url.split("/")[2] for url in page.asked if not url.startswith("data:")} == {
        served[0].removeprefix("http://")
    }
    loaded = "[...document.querySelectorAll('link[href], script[src], img[src], iframe[src]')]"
    addresses = page.evaluate(f"{loaded}.map(element => element.href || element.src)")
    assert addresses
    assert all(url.startswith((served[0], "data:")) for url in addresses)
    fonts = page.evaluate(
        "getComputedStyle(document.querySelector('#question textarea')).fontFamily"
    )
    assert fonts.startswith("system-ui")


def test_a_phone_scrolls_in_one_direction(browser, served):
    page = open_page(browser, served[0], width=390)
    set_drawer(page, 5, 3)
    ask(page, "谁弄权？" + "汉" * 40 + "？", 3)
    for tab in ("对话", "比较", "把握", "训练"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("tab", name="对话").click()
    boxes = [
        page.locator(name).bounding_box() for name in ("#question", "#send", "#stop", "#clear")
    ]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)
    page.context.close()
