"""A self-contained HTML page made from the report's Markdown, so that both always agree.

Images become data URIs, nothing is fetched (the page's own policy forbids it), and an image
`x.svg` for which `x-dark.svg` exists follows the reader's colour scheme.
"""

import base64
import html
import mimetypes
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from string import Template

from markdown_it import MarkdownIt
from markdown_it.token import Token

from laptop.files import inside

OWN_IMAGE = re.compile(r"images/[a-z0-9-]+\.(png|svg)")  # as the report writes them
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; --soft: #59636e; --line: #d8dee4;
  --shade: #f6f8fa; --accent: #1f6feb }
@media (prefers-color-scheme: dark) { :root { --paper: #0f1318; --ink: #e3e8ee; --soft: #98a2ad;
  --line: #2b323b; --shade: #181e25; --accent: #6cb0ff } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 1rem; letter-spacing: -0.01em }
h2 { font-size: 1.25rem; margin: 3rem 0 .75rem; padding-top: 1rem;
  border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.75rem 0 .5rem }
p, ul { margin: .75rem 0 }
a { color: var(--accent); text-decoration: none }
a:hover { text-decoration: underline }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; font-size: .9rem; margin: 0 0 1.5rem }
blockquote { margin: 0 0 1.25rem; padding: .9rem 1.2rem; font-size: 1.12rem; line-height: 1.5;
  background: var(--shade); border-left: 4px solid var(--accent); border-radius: 0 6px 6px 0 }
blockquote p { margin: 0 }
.wide { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; min-width: 60%; font-size: .92rem;
  font-variant-numeric: tabular-nums }
th, td { padding: .42rem .7rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top }
th { font-weight: 600; color: var(--soft); border-bottom: 2px solid var(--line);
  white-space: nowrap }
td:first-child, th:first-child { padding-left: 0 }
td { white-space: nowrap }
td:has(code + code) { white-space: normal }
tbody tr:hover { background: var(--shade) }
code, pre { font: .86em/1.55 ui-monospace, "SF Mono", Menlo, Consolas, monospace }
code { background: var(--shade); padding: .1em .35em; border-radius: 4px; overflow-wrap: anywhere }
pre { background: var(--shade); padding: .9rem 1.1rem; overflow-x: auto; border-radius: 6px;
  border: 1px solid var(--line) }
pre code { background: none; padding: 0; font-size: 1em; overflow-wrap: normal }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; border-radius: 4px }
img[src^="data:image/svg"] { width: 100% }
em { color: var(--soft) }
@media print { nav { display: none } h2 { break-after: avoid } }
"""
PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>$style</style>
</head>
<body><main>
$body
</main></body>
</html>
""")


def render(markdown: str, folder: Path) -> str:
    """The HTML page; images are read from `folder`, raw HTML in the text is shown as text."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    # its own check knows only web addresses; ours are files of the run, made data URIs here
    parser.add_render_rule("image", lambda _, *a: _image(a[0][a[1]], folder))
    parser.add_render_rule("table_open", lambda *_: '<div class="wide"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = parser.parse(markdown)
    title, contents = _number_headings(tokens)
    body: str = parser.renderer.render(tokens, parser.options, {})
    body = body.replace("</h1>", f"</h1>\n{contents}", 1)
    return PAGE.substitute(title=html.escape(title), style=STYLE, body=body)


def _number_headings(tokens: Sequence[Token]) -> tuple[str, str]:
    """Give second-level headings an id; returns the page's title and a list of links to them."""
    title, links = "report", []
    for opening, inline in pairwise(tokens):
        if opening.type != "heading_open":
            continue
        text = "".join(child.content for child in inline.children or [])
        if opening.tag == "h1":
            title = text
        elif opening.tag == "h2":
            name = re.sub(r"\W+", "-", text.lower()).strip("-")
            opening.attrSet("id", name)
            links.append(f'<a href="#{name}">{html.escape(text)}</a>')
    return title, f"<nav>{' '.join(links)}</nav>"


def _image(token: Token, folder: Path) -> str:
    alt = html.escape(token.content)
    if not OWN_IMAGE.fullmatch(str(token.attrs["src"])):
        return alt  # named by foreign text: no such file gets into the page
    path = inside(folder, token.attrs["src"], "a report")
    image = f'<img src="{data_uri(path)}" alt="{alt}">'
    dark = path.with_name(f"{path.stem}-dark{path.suffix}")
    if not dark.exists():
        return image
    media = "(prefers-color-scheme: dark)"
    return f'<picture><source srcset="{data_uri(dark)}" media="{media}">{image}</picture>'


def data_uri(path: Path) -> str:
    """The content of a file as a data URI."""
    kind, _ = mimetypes.guess_type(path.name)
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
