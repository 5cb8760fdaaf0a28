"""One HTML page that needs nothing beside it: no script, no style or font from elsewhere, pictures in its text."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .render import Picture, Table, html
from .sections import Block, Section

MARK = "<!-- hiddenkey report -->"

_STYLE = """
:root { color-scheme: light; --ink: #1a1a1a; --soft: #555; --line: #d9d9d9; --ground: #fff; --band: #f5f6f8; --link: #004f8b; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem clamp(.8rem, 3vw, 2.5rem) 4rem; max-width: 94rem; color: var(--ink);
  background: var(--ground); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: clamp(1.2rem, 2.6vw, 1.65rem); line-height: 1.35; max-width: 58rem; margin: 1rem 0 .6rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .4rem; padding-top: .8rem; border-top: 2px solid var(--ink); }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .2rem; }
p { max-width: 58rem; margin: .5rem 0; overflow-wrap: anywhere; }
.caption { color: var(--soft); font-size: .88rem; }
nav { font-size: .92rem; margin: 1rem 0; display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; }
a { color: var(--link); }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; border: 1px solid var(--line); border-radius: 4px; max-width: max-content; }
.scroll:focus { outline: 2px solid var(--link); }
table { border-collapse: separate; border-spacing: 0; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .5rem; text-align: right; vertical-align: top; border-top: 1px solid var(--line); }
td { white-space: nowrap; }
thead th { vertical-align: bottom; background: var(--band); font-weight: 600; min-width: 4.2rem; }
th.words, td.words { text-align: left; }
th[scope=row], thead th:first-child { position: sticky; left: 0; text-align: left; background: var(--ground); font-weight: 600;
  white-space: nowrap; box-shadow: 1px 0 0 var(--line); }
thead th:first-child { background: var(--band); }
thead th { border-top: 0; }
tbody tr:hover > * { background: var(--band); }
td.words { white-space: normal; min-width: 7rem; max-width: 44rem; }
td span { display: block; color: var(--soft); }
td.better { color: #00573f; font-weight: 600; }
td.worse { color: #9c3d00; font-weight: 600; }
td.unfinished { color: var(--soft); font-style: italic; }
code { font: .85em/1.4 ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace; white-space: nowrap; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1rem; margin: .8rem 0; }
figure { margin: 0; }
img { width: 100%; height: auto; display: block; border: 1px solid var(--line); border-radius: 4px; }
details { margin: .4rem 0; }
summary { cursor: pointer; color: var(--link); }
@media (max-width: 40rem) {
  body { font-size: .95rem; }
  table { font-size: .82rem; }
  th, td { padding: .3rem .45rem; }
  th[scope=row], thead th:first-child { white-space: normal; max-width: 7.5rem; overflow-wrap: break-word; }
}
@media print { .scroll { overflow: visible; } th[scope=row] { position: static; } }
"""


def page(studies: Sequence[tuple[str, Sequence[Section]]], folder: Path) -> str:
    """The page. ``studies``: (name, sections) each, the first section being the outcome. ``folder``: of the pictures."""
    outcomes = [str(block) for _, sections in studies for block in sections[0].blocks]
    title = f"hiddenkey: {', '.join(name for name, _ in studies)}"
    links: list[str] = []
    body: list[str] = []
    for name, sections in studies:
        for section in sections[1:]:
            anchor = (
                f"{_anchor(name, section.name)}-{len(body) + 1}"  # two names may be one where only letters are left
            )
            heading = section.title if len(studies) == 1 else f"{name}: {section.title}"
            links.append(f'<a href="#{anchor}">{escape(heading)}</a>')
            blocks = "\n".join(_block(block, folder) for block in section.blocks if block)
            body.append(f'<section id="{anchor}">\n<h2>{escape(heading)}</h2>\n{blocks}\n</section>')
    first, *others = outcomes
    rest = "\n".join(f"<p>{escape(text)}</p>" for text in others)
    return f"""<!DOCTYPE html>
{MARK}
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{escape(first)}</h1>
{rest}
<nav aria-label="Contents">
{chr(10).join(links)}
</nav>
</header>
<main>
{chr(10).join(body)}
</main>
</body>
</html>
"""


def _block(block: Block, folder: Path) -> str:
    if isinstance(block, Table):
        return html(block)
    if isinstance(block, str):
        return f"<p>{escape(block)}</p>"
    panels = "\n".join(_picture(picture, folder) for picture in block)
    return f'<div class="panels">\n{panels}\n</div>'


def _picture(picture: Picture, folder: Path) -> str:
    data = base64.b64encode((folder / Path(picture.path).name).read_bytes()).decode()
    return f'<figure><img src="data:image/png;base64,{data}" alt="{escape(picture.words)}" loading="lazy"></figure>'


def _anchor(*parts: str) -> str:
    return re.sub(r"[^\w-]+", "-", "-".join(parts))
