"""Text from data in a terminal and in a page: seen, and without effect."""

import html.parser
import unicodedata

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
