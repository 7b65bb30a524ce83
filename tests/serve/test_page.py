"""The page in a real browser."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from configurator import UserError
from miniglm.generation import Batch, Sampling
from miniglm.serve import page_html
from tests.helpers import dialogue
from tests.served import expected, serving, wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
PICTURE = Path(__file__).parents[2] / "docs/curves.png"
LENGTH = 40  # tokens of most answers here
expect.set_options(timeout=60000)  # ms; the machine may be slow or busy

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs chromium; on Debian: apt-get install chromium"
)


@pytest.fixture(scope="module")
def out_dirs(out_dirs):
    """With what evaluations.py and visualize.py leave."""
    shutil.copy(PICTURE, out_dirs["answers"] / "curves.png")
    (out_dirs["answers"] / "secret.png").symlink_to(PICTURE)
    evaluation = {"dataset": "data", "rouge_l": 0.25, "bits_per_byte": 2.5, "split": "<b>val</b>"}
    for name in ("evaluation.json", "evaluation-data-val.json"):
        (out_dirs["answers"] / name).write_text(json.dumps(evaluation), encoding="utf-8")
    return out_dirs


@pytest.fixture(scope="module")
def served(out_dirs):
    with serving([*out_dirs.values()]) as (address, servers):
        for server in servers.values():
            slow_down(server.batch)
        yield address, servers


def slow_down(batch: Batch) -> None:
    """So that a slow browser, too, sees an answer midway and can stop it."""
    step = batch.step

    def slowed() -> list:
        time.sleep(0.002)
        return step()

    batch.step = slowed


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


def open_page(browser: Browser, address: str, width: int = 1280) -> Page:
    """A page of its own, whose requests' addresses are kept in page.asked."""
    page = browser.new_context(viewport={"width": width, "height": 844}).new_page()
    page.set_default_timeout(60000)
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("#chat-text textarea")
    set_drawer(page, "tokens", LENGTH)
    return page


@pytest.fixture
def page(browser, served):
    page = open_page(browser, served[0])
    yield page
    page.context.close()


def set_drawer(page: Page, name: str, value: float) -> None:
    """Sets a slider of the drawer, by a word of its label."""
    field, slider = (
        page.locator(f"#settings input[type={kind}][aria-label*='{name}']")
        for kind in ("number", "range")
    )
    if not field.is_visible():
        page.get_by_text("设置 Settings").click()

    # a page that is still being built drops what is typed; the slider shows what it has taken
    def taken() -> bool:
        field.fill(str(value))
        field.press("Tab")
        page.wait_for_timeout(100)
        return slider.input_value() == str(value)

    wait_until(taken)


def send(page: Page, text: str, tab: str = "chat") -> None:
    page.fill(f"#{tab}-text textarea", text)
    page.click(f"#{tab}-text .submit-button")


def press(page: Page, title: str) -> None:
    """That button of the last message that has one."""
    page.locator(f"#chat-log button[title='{title}']").last.click()


def finished(page: Page, count: int = 1, tab: str = "chat") -> list[str]:
    """The texts of the last answers, once they are whole."""
    expect(page.locator(f"#{tab}-text .submit-button")).to_be_visible()
    expect(page.locator(f"#{tab}-log .loading-spinner")).to_have_count(0)
    return page.locator(f"#{tab}-log .content .md").all_text_contents()[-count:]


def ask(page: Page, text: str, count: int = 1, tab: str = "chat") -> list[str]:
    answers = page.locator(f"#{tab}-log .bot-row")
    before = answers.count()
    send(page, text, tab)
    expect(answers).to_have_count(before + count)
    return finished(page, count, tab)


def prompts(page: Page) -> list[str]:
    return page.locator("#chat-log .message.user .md").all_text_contents()


def start_long_answer(page: Page) -> None:
    set_drawer(page, "tokens", 20000)
    send(page, "谁弄权？")
    page.wait_for_function("document.querySelector('.content .md')?.textContent.length > 30")


def answer(out_dir: Path, text: str, number: int = 0, **options) -> str:
    sampling = Sampling(**{"max_new_tokens": LENGTH, "temperature": 0.3} | options)
    return expected(out_dir, dialogue(text), sampling, number)


def choose_model(page: Page, name: str) -> None:
    page.locator("#model input").first.click()
    page.get_by_role("option", name=name, exact=True).click()


# --- asking ------------------------------------------------------------------------------------


def test_an_answer_grows_and_is_that_of_sample_py(page, out_dirs):
    set_drawer(page, "tokens", 400)
    send(page, "谁弄权")
    growing = page.locator("#chat-log .bot-row .content .md")
    lengths = []
    while not page.locator("#chat-log button[title='Like']").is_visible():
        lengths.append(len(growing.first.text_content()) if growing.count() else 0)
    assert len(set(lengths)) > 2  # it came piece by piece
    assert lengths == sorted(lengths)
    assert finished(page) == [answer(out_dirs["answers"], "谁弄权？", max_new_tokens=400)]
    assert prompts(page) == ["谁弄权？"]  # completed as in training
    assert page.locator("#chat-text textarea").input_value() == ""


def test_stop_keeps_what_came_and_retry_asks_anew(page, out_dirs, served):
    start_long_answer(page)
    page.click("#chat-text .stop-button")
    expect(page.locator("#chat-log .title")).to_have_text("answers · 已停止 stopped")
    [text] = finished(page)
    whole = answer(out_dirs["answers"], "谁弄权？", max_new_tokens=400)
    assert len(text) > 30
    assert whole.startswith(text[: len(whole)])
    assert not served[1]["answers"].jobs
    set_drawer(page, "tokens", LENGTH)
    for attempt in (1, 2):
        press(page, "Retry")
        again = answer(out_dirs["answers"], "谁弄权？", 5 * attempt)
        expect(page.locator("#chat-log .content .md")).to_have_text(again)
        finished(page)
    assert len(prompts(page)) == 1


def test_a_question_is_edited_taken_back_and_copied(page, out_dirs):
    ask(page, "谁弄权？")
    ask(page, "殿角如何？")
    page.locator("#chat-log button[title='Edit']").first.click()
    page.fill("#chat-log .edit-textarea", "帝御何殿 & <b>？")
    press(page, "Submit")
    expect(page.locator("#chat-log .bot-row")).to_have_count(1)
    assert finished(page) == [answer(out_dirs["answers"], "帝御何殿 & <b>？")]
    assert prompts(page) == ["帝御何殿 & <b>？"]
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    press(page, "Copy message")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert answer(out_dirs["answers"], "帝御何殿 & <b>？") in copied
    press(page, "Undo")
    expect(page.locator("#chat-log .user-row")).to_have_count(0)
    assert page.locator("#chat-text textarea").input_value() == "帝御何殿 & <b>？"


def test_several_samples_stand_side_by_side(page, out_dirs):
    set_drawer(page, "samples", 3)
    set_drawer(page, "temperature", 1)
    texts = ask(page, "帝御何殿？", 3)
    assert texts == [answer(out_dirs["answers"], "帝御何殿？", n, temperature=1) for n in range(3)]
    assert len(set(texts)) == 3
    boxes = [card.bounding_box() for card in page.locator("#chat-log .bot-row").all()]
    assert len({box["y"] for box in boxes}) == 1


def test_turns_stay_and_are_given_to_the_model_where_wanted(page, out_dirs):
    [first] = ask(page, "谁弄权？")
    assert ask(page, "帝御何殿？") == [answer(out_dirs["answers"], "帝御何殿？")]
    press(page, "Clear")
    expect(page.locator("#chat-log .user-row")).to_have_count(0)
    page.get_by_label("接上文 Follow").check()
    assert ask(page, "谁弄权？") == [first]
    given = dialogue("谁弄权？", first, "帝御何殿？")
    sampling = Sampling(max_new_tokens=LENGTH, temperature=0.3)
    assert ask(page, "帝御何殿？") == [expected(out_dirs["answers"], given, sampling)]
    assert prompts(page) == ["谁弄权？", "帝御何殿？"]


def test_clear_stops_what_runs(page, served):
    start_long_answer(page)
    press(page, "Clear")
    expect(page.locator("#chat-log .user-row")).to_have_count(0)
    wait_until(lambda: not served[1]["answers"].jobs)
    set_drawer(page, "tokens", 5)
    assert ask(page, "帝御何殿？")


def test_another_model_says_what_it_is_and_continues(page, out_dirs):
    facts = page.locator(".facts")
    for fact in ("问答 answers", "0.04M 参数", "unseen 0.250"):
        expect(facts).to_contain_text(fact)
    choose_model(page, "novel")
    expect(facts).to_contain_text("续写 continues")
    expect(page.locator("#settings input[type=number]").first).to_have_value("0.8")
    assert ask(page, "却说曹操") == [answer(out_dirs["novel"], "却说曹操", temperature=0.8)]
    assert prompts(page) == ["却说曹操"]


def test_a_closed_page_is_not_answered_further(browser, served):
    page = open_page(browser, served[0])
    start_long_answer(page)
    assert served[1]["answers"].jobs
    page.context.close()
    wait_until(lambda: not served[1]["answers"].jobs)


def test_marks_become_lines_of_preference_data(page, out_dirs):
    file = out_dirs["answers"] / "marks.jsonl"
    file.unlink(missing_ok=True)
    [text] = ask(page, "谁弄权")
    press(page, "Like")
    liked = page.locator("#chat-log button[title='Liked']")
    expect(liked).to_be_visible()
    for button in (liked, page.locator("#chat-log button[title='Dislike']")):  # once and for all
        assert button.evaluate("b => getComputedStyle(b).pointerEvents") == "none"
    choose_model(page, "novel")
    [more] = ask(page, "却说")
    press(page, "Dislike")
    expect(page.locator("#chat-log button[title='Disliked']")).to_be_visible()
    expect(liked).to_be_visible()
    question = {"prompt": dialogue("谁弄权？"), "chosen": text}
    assert [json.loads(line) for line in file.read_text("utf-8").splitlines()] == [question]
    continued = json.loads((out_dirs["novel"] / "marks.jsonl").read_text(encoding="utf-8"))
    assert continued == {"prompt": "却说", "rejected": more}


# --- the other tabs ----------------------------------------------------------------------------


def test_two_models_are_compared_on_one_prompt(page, out_dirs):
    page.get_by_role("tab", name="比较").click()
    assert ask(page, "董卓", 2, "compare") == [
        answer(out_dirs["answers"], "董卓？"),
        answer(out_dirs["novel"], "董卓", temperature=0.8),
    ]
    titles = [f"{name} · 到长度上限 cut at length" for name in ("answers · 1", "novel · 2")]
    expect(page.locator("#compare-log .title")).to_have_text(titles)


def test_what_one_model_cannot_read_the_other_still_continues(page, out_dirs):
    text = "却说" * 700
    page.get_by_role("tab", name="Compare").click()
    send(page, text, "compare")
    cards = page.locator("#compare-log .bot-row")
    expect(cards.nth(0).locator(".error")).to_contain_text("longer than block_size")
    wanted = answer(out_dirs["novel"], text, temperature=0.8)
    expect(cards.nth(1).locator(".content .md")).to_have_text(wanted)


def test_certainty_shades_tokens_by_their_probability(page, out_dirs):
    page.get_by_role("tab", name="把握").click()
    send(page, "谁弄权？", "certainty")
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
    percents = " ".join(tip.locator("em").all_text_contents())
    assert re.fullmatch(r"(\d+\.\d% ?){5,}", percents)


def test_the_run_tab_has_evaluation_and_the_pictures_of_the_out_dir_alone(page):
    page.get_by_role("tab", name="训练").click()
    report = page.locator("#report")
    expect(report).to_contain_text("0.250")
    expect(report).to_contain_text("<b>val</b>")
    assert report.locator("img").count() == 1  # secret.png is a link to elsewhere
    assert report.locator("img").evaluate("picture => picture.naturalWidth") > 1
    choose_model(page, "novel")
    expect(report).to_contain_text("not evaluated yet")


# --- text is text ------------------------------------------------------------------------------

NASTY = (
    "<img src=x onerror=window.hacked=1><script>window.hacked=1</script> **粗** &lt; <|im_end|>\n"
    "[a](http://evil.example) ![b](http://evil.example/x.png) $$x$$ ${window.hacked=1} {{value}} "
    '<b>b</b> <img src="http://evil.example/y.png"> <!-- c --> `d` ~~~e~~~'
)


@pytest.mark.parametrize("tab", ["chat", "compare", "certainty"])
def test_html_and_markdown_are_shown_as_text(page, tab):
    choose_model(page, "novel")
    page.get_by_role("tab", name=tab).click()
    send(page, NASTY, tab)
    log = page.locator(f"#{tab}-log")
    shown = log.locator(".given" if tab == "certainty" else ".message.user .md")
    expect(shown).to_have_count(1)
    assert shown.text_content() == NASTY
    assert not log.locator("img, script, a, strong, b, code, .katex").count()
    assert page.evaluate("window.hacked") is None
    assert not [url for url in page.asked if "evil" in url]


def test_a_question_of_100000_characters_gets_a_message(page, out_dirs):
    send(page, "问" * 99_999)
    expect(page.locator(".error")).to_contain_text("100,000 characters; this model reads 256")
    assert len(prompts(page)[0]) < 1100
    assert ask(page, "谁弄权？") == [answer(out_dirs["answers"], "谁弄权？")]


# --- without a network, on a phone -------------------------------------------------------------


def test_nothing_is_asked_of_another_host(page, served):
    ask(page, "谁弄权？")
    for tab in ("比较", "把握", "训练"):
        page.get_by_role("tab", name=tab).click()
    assert page.asked
    assert all(url.startswith((served[0], "data:")) for url in page.asked)
    fonts = page.locator("#chat-text textarea").evaluate("box => getComputedStyle(box).fontFamily")
    assert fonts.startswith("system-ui")


def test_a_phone_scrolls_in_one_direction(browser, served):
    page = open_page(browser, served[0], width=390)
    set_drawer(page, "samples", 3)
    ask(page, "谁弄权？" + "汉" * 40 + "？", 3)
    for tab in ("对话", "比较", "把握", "训练"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("tab", name="对话").click()
    cards = page.locator("#chat-log .bot-row").all()
    boxes = [part.bounding_box() for part in (*cards, page.locator("#chat-text .submit-button"))]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)
    page.context.close()


@pytest.mark.parametrize("content", ["[]", "{", "[" * 10**5])
def test_a_damaged_report_is_named(content, tmp_path):
    (tmp_path / "evaluation.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"evaluation\.json is damaged; evaluate again"):
        page_html.read_json(tmp_path / "evaluation.json")
