"""Text that nobody vouches for, made fit to be shown: in a terminal and in an HTML page.

Inputs come from data sets and outputs from models. Characters that a terminal or a browser would
act upon, or not show, are replaced by visible ones; HTML is escaped; a page may load nothing.

A `Table` is made once and shown in both: `text_table`, `html_table`.
"""

import dataclasses
import html
from collections.abc import Sequence

import numpy as np

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


def clipped(text: str, most: int) -> str:
    """Returns the start of a text, visible, of at most so many characters."""
    text = visible(text[: most + 1])
    return text if len(text) <= most else f"{text[: most - 1]}…"


def shortened(text: str, most: int) -> str:
    """Returns the start and the end of a text, about so many characters: not yet visible."""
    if len(text) <= most:
        return text
    tail = most // 3
    return f"{text[: most - tail]} […] {text[-tail:]}"


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


# --- Tables ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bar:
    """A cell that is a bar.

    Attributes:
      share: of the longest that there can be, in [0, 1].
    """

    share: float

    def text(self, width: int) -> str:
        """Returns the bar in eighths of a character; only of nothing is nothing to be seen."""
        eighths = int(np.ceil(np.round(self.share * width * 8, 6)))
        return "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]


Cell = str | Bar
Table = tuple[Sequence[str], Sequence[Sequence[Cell]]]  # header, rows
TEXT_BAR = 22  # characters


def percent(share: float) -> str:
    """`37.5%`; what is more than nothing never looks like nothing."""
    return f"{share:.1%}" if share == 0 or share >= 0.001 else "<0.1%"


def text_table(table: Table, left: Sequence[int] = (0,)) -> str:
    """Returns a table for a terminal, without a line break at its end.

    Args:
      table: plain text; bars stand at the left.
      left: columns whose text does too.
    """
    header, rows = table
    cells = [
        [c.text(TEXT_BAR) if isinstance(c, Bar) else visible(c) for c in row]
        for row in (header, *rows)
    ]
    left = {*left, *(i for row in rows for i, cell in enumerate(row) if isinstance(cell, Bar))}
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def html_table(table: Table, left: Sequence[int] = (0,)) -> str:
    """Returns a table for a page with `STYLE`."""

    def cell(i: int, value: Cell, tag: str) -> str:
        if isinstance(value, Bar):
            bar = f'<span style="width:{value.share:.2%}"></span>' if value.share else ""
            return f"<td class=bar>{bar}</td>"
        return f"<{tag}{' class=l' if i in left else ''}>{escape(value)}</{tag}>"

    def row(cells: Sequence[Cell], tag: str) -> str:
        return f"<tr>{''.join(cell(i, value, tag) for i, value in enumerate(cells))}</tr>"

    header, rows = table
    body = "\n".join(row(cells, "td") for cells in rows)
    return (
        f"<div class=wide><table>\n<thead>{row(header, 'th')}</thead>\n<tbody>{body}</tbody>\n"
        "</table></div>"
    )


def html_facts(facts: Sequence[tuple[str, str]]) -> str:
    """Returns (name, value)s as a list of definitions."""
    return "<dl>" + "".join(f"<dt>{escape(n)}</dt><dd>{escape(v)}</dd>" for n, v in facts) + "</dl>"


def histogram(values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts values in bins of a round width.

    Args:
      values: whole numbers [n].
      most: bins.

    Returns:
      (edges, counts), int [k + 1] and [k], k <= most: bin i holds edges[i] <= value < edges[i+1].
    """
    if not len(values):
        return np.array([0, 1]), np.array([0])
    low, high = int(np.min(values)), int(np.max(values))
    widths = (m * 10**e for e in range(19) for m in (1, 2, 5))
    width = next(w for w in widths if high // w - low // w < most)
    edges = np.arange(low // width, high // width + 2) * width
    return edges, np.bincount(np.asarray(values) // width - low // width, minlength=len(edges) - 1)


def histogram_table(values: np.ndarray, most: int, names: Sequence[str]) -> Table:
    """Returns a `histogram` as a table.

    Args:
      values: whole numbers [n].
      most: bins.
      names: of the columns for the values, their count and the bars.
    """
    edges, counts = histogram(values, most)
    return names, [
        (f"{a:,}" if b - a == 1 else f"{a:,} - {b - 1:,}", f"{n:,}", Bar(n / max(1, counts.max())))
        for a, b, n in zip(edges.tolist(), edges[1:].tolist(), counts.tolist(), strict=False)
    ]


# Of every page that is made of these. Colours are named, so that a page may have more and take them
# where it is dark, too.
STYLE = """
:root { color-scheme: light dark; --ink: #1a202c; --soft: #4a5568; --ground: #fff;
  --raised: #f7fafc; --line: #cbd5e0; --hair: #e2e8f0; --blue: #2b6cb0; --blueground: #e3effb;
  --amber: #b45309; --amberground: #fdebd3; --violet: #6b46c1; --violetground: #efe8fb; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e2e8f0; --soft: #a0aec0; --ground: #12161d; --raised: #1a202a; --line: #414c5e;
    --hair: #2a3342; --blue: #63b3ed; --blueground: #17304a; --amber: #f6ad55;
    --amberground: #3d2a12; --violet: #b794f4; --violetground: #2c2146; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground);
       max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line);
     padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; overflow-wrap: anywhere; }
p, dd { overflow-wrap: anywhere; } p.note { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .22rem .7rem; text-align: right; border-bottom: 1px solid var(--hair); }
th { background: var(--raised); font-weight: 600; } th.l, td.l { text-align: left; }
td { white-space: pre; }
td.bar { width: 11rem; min-width: 5rem; }
td.bar span { display: block; height: .75rem; min-width: 1px; background: var(--blue);
              border-radius: 2px; }
dl { display: grid; grid-template-columns: max-content auto; gap: .15rem 1rem; margin: .6rem 0; }
dt { color: var(--soft); } dd { margin: 0; }
img { max-width: 100%; height: auto; display: block; margin: .5rem 0; }
.example { border: 1px solid var(--hair); border-radius: 6px; padding: .2rem 1rem .6rem;
           margin: 1rem 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--raised); padding: .5rem; }
"""
