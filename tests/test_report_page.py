"""The report's page: nothing that data could do to it, and in Chromium that it works.

The tests in Chromium need Playwright (the `browser` extra) and skip without it.
"""

import base64
import hashlib
import html.parser
import json
import pathlib
import re
import time

import evaluation_results
import pytest

from distill import report

ROOT = pathlib.Path(__file__).parents[1]
NASTY = (
    '</script><script>pwned=1</script><img src=x onerror="pwned=1">]]><!--<script>\'\u2028\u2029'
    "\u202etxet\u2066 \0 \x1b[31m \ud800 $style ${1} \\u003c &amp; <svg onload=pwned=1>"
)
LONG = "a" * 5000


def hostile(dataset, split, i, example):
    """Makes every text of an example what a page must not act upon, or not overflow from."""
    for name in ("input", "label", "teacher", "teacher_rationale", "human_rationale"):
        example[name] = f"{NASTY}\n{i} {LONG if i % 2 else ''}"
    example["wrong"] = [f"{NASTY} wrong", LONG]
    example["example_id"] = f"{NASTY}{i}"


class Page(html.parser.HTMLParser):
    """Tags, attributes and the data of a page, as a browser would read them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attrs, self.inside, self.text = set(), [], None, {}
        self.feed(page)
        self.close()
        self.data = json.loads(self.text["data"])

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attrs += [(tag, name, value) for name, value in attrs]
        raw = tag in ("script", "style")
        self.inside = dict(attrs).get("id", tag) if raw else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, text):
        if self.inside:
            self.text[self.inside] = self.text.get(self.inside, "") + text


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    evaluation_results.write(folder, n=50)
    return report.build([str(folder)])


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nasty")
    evaluation_results.write(folder, n=30, datasets=("esnli",), edit=hostile)
    for path in folder.rglob("results.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        names = {"dataset": f"esnli{NASTY}", "task": f"t{NASTY}", "decoder": f"d{NASTY}"}
        for r in rows:
            r |= {k: v for k, v in names.items() if r.get(k)}
            if r["run"] != "teacher":
                r["run"] += NASTY + LONG
        bad = json.dumps(rows[0] | {"value": "x"})
        path.write_text("".join(json.dumps(r) + "\n" for r in rows) + f"{bad}\n")
    return report.build([str(folder)])


# --- Without a browser ----------------------------------------------------------------------------


def test_the_page_is_harmless_whatever_the_texts_are(nasty):
    made = report.html_report(nasty)
    page = Page(made)
    assert page.tags <= {
        "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "p", "nav",
        "a", "main", "section", "ul", "li", "div", "table", "thead", "tbody", "tr", "th", "td",
        "small", "b", "span", "wbr", "svg", "path", "circle", "noscript", "label", "select",
        "button", "input", "script",
    }  # fmt: skip
    assert not [name for _, name, _ in page.attrs if name.startswith("on") or name == "style"]
    assert all(v.startswith("#") for _, name, v in page.attrs if name in ("href", "src"))
    assert not re.search(r"https?:(?!//www\.w3\.org/2000/svg)|url\(|@import", made)
    assert "\u2028" not in made and "\u202e" not in made and "\0" not in made
    assert made.count("<script") == 2 and made.count("</script") == 2
    made.encode("utf-8")
    # Each text is there, as it is shown.
    shown = page.data["texts"][0][1]
    assert shown.startswith('</script><script>pwned=1</script><img src=x onerror="pwned=1">]]>')
    assert "<U+202E>txet<U+2066> <U+0000> <ESC>[31m <U+D800> $style" in shown and "\n0 " in shown


def test_only_the_page_s_own_script_and_style_may_run(made):
    page = Page(report.html_report(made))
    policy = next(v for tag, name, v in page.attrs if tag == "meta" and "default-src" in (v or ""))
    for kind in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.text[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    assert ("script", "type", "application/json") in page.attrs


def test_no_script_parses_text_as_html():
    for path in (ROOT / "distill/report").glob("*.js"):
        source = path.read_text("utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|eval\(|Function\(",
            source,
        )
        assert max(map(len, source.splitlines())) <= 100


def test_the_data_is_what_was_predicted(made):
    data = Page(report.html_report(made)).data
    assert len(data["sets"]) == len(made.examples)
    by_name = {s["name"]: s for s in data["sets"]}
    for examples in made.examples:
        r = examples.result
        name = f"{made.names[r.run]}/greedy/{r.task}/{r.split}/{r.step}"
        rows = by_name[name]["rows"]
        assert by_name[name]["total"] == len(rows) == len(examples.rows)
        for (index, *own), want in zip(rows, examples.rows, strict=True):
            assert data["texts"][index] == [want[k] for k in (
                "example_id", "input", "label", "teacher", "teacher_rationale", "human_rationale",
                "teacher_correct",
            )]  # fmt: skip
            generated = want["generated"] if want["generated"] != want["prediction"] else None
            assert own == [want["prediction"], want["correct"], want["rationale"],
                           want["probability"], generated]  # fmt: skip
    # What students share is there once.
    assert len(data["texts"]) == 3 * 2 * 50
    assert by_name and data["sets"][0]["split"] == "test" and "chosen" in data["sets"][0]["tags"]


def test_a_page_holds_at_most_so_many_examples_of_a_file(made):
    data = Page(report.html_report(made, max_examples=7)).data
    assert {(len(s["rows"]), s["total"]) for s in data["sets"]} == {(7, 50)}
    assert len(data["texts"]) == 3 * 2 * 7
    assert not Page(report.html_report(made, max_examples=0)).data["texts"]


# --- In Chromium ----------------------------------------------------------------------------------


@pytest.fixture
def opened(browser, tmp_path):
    """Opens reports; at the end, none may have logged, requested or asked for anything."""
    pages, wrong = [], []

    def open_page(made, fragment="", max_examples=1000, **options):
        path = tmp_path / f"{len(pages)}.html"
        path.write_bytes(report.html_report(made, max_examples).encode())
        page = browser.new_page(**{"viewport": {"width": 1180, "height": 800}, **options})
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda r: r.url.split("#")[0] == path.as_uri() or wrong.append(r.url))
        page.goto(f"{path.as_uri()}#{fragment}")
        pages.append(page)
        return page

    yield open_page
    assert not wrong
    for page in pages:
        page.close()


def shown(page, selector):
    return page.locator(selector).all_text_contents()


@pytest.mark.parametrize("width", [360, 1180])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_text_runs_or_overflows(opened, nasty, width, scheme):
    page = opened(nasty, viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert page.evaluate("typeof pwned") == "undefined"
    assert page.locator("#cards .card").count() == 20
    assert page.locator("#cards :is(img, script), #cards svg").count() == 0
    first = page.locator("#cards .card").first
    assert first.locator(".text").first.text_content().startswith("</script><script>pwned=1")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.querySelector('#vs').selectedIndex = 1")
    page.locator("#vs").dispatch_event("change")
    page.locator("#panels svg").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".tip").first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 29)"
    assert dark == (scheme == "dark")


def test_filters_show_the_examples_that_they_name(opened, made):
    examples = next(e for e in made.examples if e.is_best and e.result.split == "test")
    page = opened(made, max_examples=1000)
    wanted = {
        "all": [r["example_id"] for r in examples.rows],
        "errors": [r["example_id"] for r in examples.rows if not r["correct"]],
        "teacher": [r["example_id"] for r in examples.rows if not r["teacher_correct"]],
        "disagree": [
            r["example_id"]
            for r in examples.rows
            if r["prediction"] != r["teacher"]
            and not (r["correct"] and r["teacher_correct"])
        ],
    }  # fmt: skip
    assert 20 < len(wanted["errors"]) < 50
    for name, ids in wanted.items():
        page.locator(f"[data-show={name}]").click()
        assert page.locator(f"[data-show={name}] span").text_content() == str(len(ids))
        assert page.locator(f"[data-show={name}]").get_attribute("aria-pressed") == "true"
        got = shown(page, ".card header a")
        while (more := page.locator(".pages button:enabled", has_text="next")).count():
            more.first.click()
            got += shown(page, ".card header a")
        assert got == ids
        if name == "errors":
            assert set(shown(page, ".card dd:nth-of-type(2) .mark")) == {"\u2717 wrong"}


def test_a_rationale_of_people_is_shown_as_theirs(opened, tmp_path):
    def edit(dataset, split, i, example):
        example["human_rationale"] = "People said so."

    evaluation_results.write(tmp_path, n=1, edit=edit)
    page = opened(report.build([str(tmp_path)]))
    texts = shown(page, ".card:first-child .reason")
    assert "human\u2019s rationalePeople said so." in texts


def test_two_students_are_compared(opened, made):
    pair = made.comparisons[0]
    page = opened(made)
    row = page.locator("#pairs-table tbody tr").first
    row.locator("a").nth(1).click()  # only B right
    right = {r["example_id"]: r["correct"] for r in pair.b.rows}
    want = [r["example_id"] for r in pair.a.rows if not r["correct"] and right[r["example_id"]]]
    assert len(want) == pair.paired.only_b > 0
    assert page.locator(".found").first.text_content() == f"{pair.paired.only_b} of 50 examples"
    assert shown(page, ".card header a") == want[:20]
    names = [made.label(e.result.student) for e in (pair.a, pair.b)]
    assert shown(page, ".card:first-child dt") == ["gold", *names, "teacher"]
    marks = shown(page, ".card:first-child .mark")
    assert marks[:2] == ["\u2717 wrong", "\u2713 right"]
    # Another student alone ends the comparison's filter.
    page.locator("#vs").select_option("")
    assert page.locator("[data-show=other]").count() == 0
    assert page.locator(".found").first.text_content() == "50 examples"


def test_student_task_split_and_step_are_chosen(opened, made):
    page = opened(made)
    for select, value in (("student", "base"), ("task", "svamp_predict"), ("split", "validation"),
                          ("step", "2500")):  # fmt: skip
        page.locator(f"#{select}").select_option(value)
        assert page.locator(f"#{select}").input_value() == value
    want = next(
        e for e in made.examples
        if (made.label(e.result.student), e.result.task, e.result.split, e.result.step)
        == ("base", "svamp_predict", "validation", 2500)
    )  # fmt: skip
    assert page.locator("#student").input_value() == "base"
    cards = page.locator(".card")
    for i, r in enumerate(want.rows[:3]):
        text = cards.nth(i).locator(".text").first.text_content()
        assert text == r["input"] and "\n" in text
        assert r["prediction"] in cards.nth(i).locator("dd").nth(1).text_content()
    assert (
        cards.first.locator(".text")
        .first.evaluate("node => getComputedStyle(node).whiteSpace")
        .startswith("pre-wrap")
    )


def test_the_address_has_the_state_and_links_lead_to_an_example(opened, made):
    page = opened(made)
    page.locator("#student").select_option("base")
    page.locator("[data-show=errors]").click()
    page.locator("#q").fill("CANOE years")
    found = shown(page, ".card header a")
    assert found and all("canoe" in text for text in shown(page, ".card .body > .text"))
    page.locator("[data-x=tokens]").click()
    again = opened(made, page.url.split("#")[1])
    assert shown(again, ".card header a") == found
    assert again.locator("#q").input_value() == "CANOE years"
    assert again.locator("[data-x=tokens]").get_attribute("aria-pressed") == "true"

    again.locator(".card header a").last.click()
    assert shown(again, ".card.linked header a") == found[-1:]
    far = "cqa/test/45"  # on the third page
    name = again.url.split("set=")[1].split("&")[0]
    third = opened(made, f"set={name}&id={far}")
    assert shown(third, ".card.linked header a") == [far]
    assert third.locator(".pages").first.text_content() == "previous3 / 3next"
    assert third.locator(".card.linked").evaluate("node => node.getBoundingClientRect().top") < 800
    gone = opened(made, "set=no/such")
    assert "no examples of no/such" in gone.locator("#cut").text_content()


def test_it_says_where_examples_were_cut(opened, made):
    page = opened(made, max_examples=7)
    note = page.locator("#cut")
    assert note.is_visible() and "the first 7 of 50 examples" in note.text_content()
    assert not opened(made).locator("#cut").is_visible()


def test_curves_follow_metric_axis_and_legend(opened, made):
    page = opened(made)
    assert shown(page, "figcaption") == [
        f"{d}accuracy, validation" for d in ("cqa", "esnli", "svamp")
    ]
    first = page.locator("#panels figure").first
    assert first.locator(".curve").count() == first.locator(".star").count() == 3
    assert first.locator(".band").count() == first.locator(".ring").count() == 3
    assert f"teacher {made.panels[0].teacher.value:.3f}" in first.text_content()
    steps = shown(page, "figure:first-child text")
    page.locator("[data-x=tokens]").click()
    assert (
        "training tokens" in first.text_content()
        and shown(page, "figure:first-child text") != steps
    )
    page.locator("#legend button").first.click()
    assert first.locator(".curve").count() == 2
    page.locator("#metric").select_option("unparsed")
    assert shown(page, "figcaption") == ["svampunparsed, validation"]
    assert page.locator("#panels .told").count() == 0  # no teacher's line of this metric


def test_curves_are_read_by_keys_and_by_pointer(opened, made):
    page = opened(made)
    picture = page.locator("#panels figure > svg").first
    picture.focus()
    page.keyboard.press("ArrowRight")
    tip = page.locator("#panels .tip").first
    line = made.panels[0].lines[0]
    assert tip.text_content().startswith("step 500")
    assert f"{line.points[0].value:.3f}[{line.points[0].low:.3f}, " in tip.text_content()
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    box = picture.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 25, box["y"] + 50)
    assert tip.text_content().startswith("step 2,500")


def test_values_are_sorted_and_filtered(opened, made):
    page = opened(made)
    page.locator("#filter").fill("Svamp TEST accuracy base")
    rows = page.locator("#values-table tbody tr:visible")
    assert rows.count() == 5 and "5 of 126 values" in page.locator("#filtered").text_content()
    value = page.locator("#values-table th button", has_text="value")
    for direction, reverse in (("ascending", False), ("descending", True)):
        value.click()
        numbers = [float(text) for text in shown(page, "#values-table tr:visible td:nth-child(9)")]
        assert numbers == sorted(numbers, reverse=reverse)
        sort = page.locator("#values-table th[aria-sort]")
        assert sort.count() == 1 and sort.get_attribute("aria-sort") == direction
    page.locator("#filter").fill("")
    page.locator("#values-table th button", has_text="step").click()
    steps = shown(page, "#values-table tbody td:nth-child(7)")
    assert steps[:30] == ["500"] * 24 + ["1,000"] * 6 and steps[-6:] == [""] * 6  # no number last


def test_everything_is_reached_by_the_keyboard(opened, made):
    page = opened(made)
    reached = set()
    for _ in range(150):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(
            "(n => n.id || n.dataset.show || n.dataset.x || n.tagName)(document.activeElement)"
        ))  # fmt: skip
    assert {"A", "step", "tokens", "metric", "student", "task", "split", "vs", "all", "errors",
            "q", "svg"} <= reached  # fmt: skip
    page.locator("[data-show=errors]").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.dataset.show") == "errors"


def test_it_prints_without_controls_and_in_light(opened, made):
    page = opened(made, color_scheme="dark")
    page.emulate_media(media="print")
    assert not page.locator("#q").is_visible() and page.locator("#cards .card").first.is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('.tall')).maxHeight") == "none"


def test_without_javascript_the_tables_are_there(browser, made, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(report.html_report(made))
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.locator("#values-table tbody tr").count() == 126
    assert "Curves and examples need JavaScript" in page.locator("noscript").text_content()
    context.close()


def test_ten_thousand_examples_stay_fast(opened, tmp_path):
    evaluation_results.write(tmp_path / "many", n=10_000, datasets=("svamp",), steps=(500,))
    made = report.build(
        [str(tmp_path / "many" / "labels"), str(tmp_path / "many/step_by_step/base")]
    )
    page = opened(made, max_examples=10_000)
    assert "10,000 examples" in page.locator(".found").first.text_content()
    page.locator("#vs").select_option(index=1)
    took = []
    for text in ("eggs", "eggs 4", "eggs 43 mia"):
        start = time.perf_counter()
        page.locator("#q").fill(text)
        assert "of 10,000 examples" in page.locator(".found").first.text_content()
        took.append(time.perf_counter() - start)
    # About 30 ms in the page on an idle machine; the bound is for a busy one.
    assert max(took) < 2
