"""Text that nobody vouches for, made fit to be shown: in a terminal and in an HTML page.

Inputs come from data sets and outputs from models. Characters that a terminal or a browser would
act upon, or not show, are replaced by visible ones; HTML is escaped; a page may load nothing.
"""

import html

_NAMED = {"\t": "<TAB>", "\n": "<LF>", "\r": "<CR>", "\x1b": "<ESC>"}


def visible(text: str) -> str:
    """Returns a text in which every character can be seen and none does anything.

    Control characters, white space other than the space, and what turns the direction of writing
    or has no width become `<LF>` or `<U+202E>`. (Unicode's control pictures lack in many fonts.)
    """
    return text if text.isprintable() else "".join(map(_visible_character, text))


def visible_lines(text: str) -> str:
    """Returns what `visible` does, with line breaks left as they are."""
    return "\n".join(map(visible, text.split("\n")))


def _visible_character(character: str) -> str:
    # False for all of Unicode's C* (control, format, surrogate, private, unassigned) and Z* (white
    # space) but the space.
    if character.isprintable():
        return character
    return _NAMED.get(character, f"<U+{ord(character):04X}>")


def escape(text: str) -> str:
    """Returns a text, visible, for the inside of an HTML element or of a quoted attribute."""
    return html.escape(visible(text))


def html_document(title: str, body: str, *, style: str, policy: str) -> str:
    """Returns a whole HTML page.

    Args:
      title: plain text.
      body: HTML.
      style: CSS.
      policy: of content, beside `default-src 'none'`: the page loads nothing but what this allows.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; {policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"{body}\n</body>\n</html>\n"
    )
