"""Text from data in a terminal and in a page: seen, and without effect."""

import html.parser
import re
import unicodedata

import numpy as np
import pytest

from distill import display


def test_what_cannot_be_seen_is_made_visible():
    for code in range(0x30000):
        character = chr(code)
        shown = display.visible(character)
        assert not any(unicodedata.category(c)[0] in "CZ" for c in shown.replace(" ", ""))
        if unicodedata.category(character)[0] not in "CZ" or character == " ":
            assert shown == character
    assert display.visible("a\nb\x1b[0m\u202e") == "a<LF>b<ESC>[0m<U+202E>"
    assert display.visible_lines("a\r\n\nb\u2028c") == "a<CR>\n\nb<U+2028>c"


def test_escaped_text_is_text_inside_an_element_and_an_attribute():
    nasty = "</script><img src=x onerror=\"a()\" title='b'>&amp;\0"
    seen = []

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            seen.append((tag, dict(attrs)))

        def handle_data(self, data):
            seen.append(data)

    parser = Parser()
    parser.feed(f'<p title="{display.escape(nasty)}">{display.escape(nasty)}')
    parser.close()
    shown = nasty.replace("\0", "<U+0000>")
    assert seen[0] == ("p", {"title": shown}) and "".join(seen[1:]) == shown


def test_a_document_escapes_its_title_and_loads_nothing_by_default():
    page = display.html_document("<b>", "<p>c</p>", style="p{}", policy="img-src data:")
    assert "<title>&lt;b&gt;</title>" in page and "<p>c</p>" in page
    assert "content=\"default-src 'none'; img-src data:\"" in page


# --- Tables ---------------------------------------------------------------------------------------


def test_a_table_is_the_same_in_a_terminal_and_in_a_page():
    table = (("name", "n", ""), [("a\n<b>", "7", display.Bar(1)), ("c", "12", display.Bar(0.25)),
                                 ("d", "0", display.Bar(0))])  # fmt: skip
    assert display.text_table(table).splitlines() == [
        "name       n",
        "-" * (8 + 2 + 2 + 2 + display.TEXT_BAR),
        "a<LF><b>   7  " + "█" * display.TEXT_BAR,
        "c         12  █████▌",
        "d          0",
    ]
    page = display.html_table(table)
    assert "<td class=l>a&lt;LF&gt;&lt;b&gt;</td><td>7</td>" in page
    assert re.findall('class=bar><span style="width:(.*?)"', page) == ["100.00%", "25.00%"]
    assert page.count("<td class=bar></td>") == 1


def test_only_nothing_looks_like_nothing():
    assert display.Bar(0).text(22) == "" and display.Bar(1e-4).text(22) == "▏"
    assert display.Bar(0.3).text(10) == "███"  # 0.3 * 80 is 24.000000000000004
    assert [display.percent(share) for share in (0, 1e-5, 0.375, 1)] == [
        "0.0%", "<0.1%", "37.5%", "100.0%",
    ]  # fmt: skip


@pytest.mark.parametrize("most", [1, 10, 40])
def test_a_histogram_counts_every_value_once(most):
    rng = np.random.default_rng(0)
    for values in (
        np.array([], int), np.array([0]), np.array([7, 7, 7]), np.array([3, 10**9]),
        rng.integers(0, 2000, 500), rng.integers(95, 105, 50),
    ):  # fmt: skip
        edges, counts = display.histogram(values, most)
        assert counts.sum() == len(values) and len(counts) == len(edges) - 1 <= most
        widths = set(np.diff(edges))
        assert len(widths) == 1 and re.fullmatch("[125]0*", str(widths.pop()))
        np.testing.assert_array_equal(
            counts, np.histogram(values, [*edges[:-1], edges[-1] - 0.5])[0]
        )


def test_a_histogram_names_its_bins():
    made = display.histogram_table(np.array([3, 3, 17]), 10, ("words", "n", ""))
    assert made[1][0] == ("2 - 3", "2", display.Bar(1.0)) and made[1][-1][0] == "16 - 17"
    made = display.histogram_table(np.array([3, 3, 5]), 10, ("words", "n", ""))
    assert [cells[:2] for cells in made[1]] == [("3", "2"), ("4", "0"), ("5", "1")]
