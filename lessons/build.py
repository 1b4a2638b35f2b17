"""Runs the lessons, exercises blank, and writes docs/lessons/lesson_N.html with what they print and
draw: pages that need no network.

    python lessons/build.py                # five minutes on two cores, most of it the lessons' run
"""
import html
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import HTMLExporter

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from lab.reader import formula  # noqa: E402  (the project's root is on the path now)

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>
:root {{ color-scheme: light dark; --soft: #f3f3f1; --mute: #5c5c58; --link: #005a9c }}
@media screen and (prefers-color-scheme: dark) {{
  :root {{ --soft: #242627; --mute: #a5a5a0; --link: #7cc0f5 }}
  body {{ background: #191a1b; color: #e6e6e2 }} img {{ filter: invert(.9) hue-rotate(180deg) }} }}
body {{ font: 16px/1.6 system-ui, sans-serif; max-width: 52rem; margin: auto; padding: 1rem;
  overflow-wrap: break-word }}
a {{ color: var(--link) }} img {{ max-width: 100%; background: #fff }}
pre {{ background: var(--soft); padding: .6rem; font-size: .85rem; overflow-x: auto;
  margin: .3rem 0 }}
.jp-OutputArea pre {{ background: none; border-left: 3px solid #0072b2; white-space: pre-wrap }}
.jp-InputPrompt, .jp-OutputPrompt, .anchor-link {{ display: none }} math {{ font-size: 1.1em }}
.formula {{ overflow-x: auto }}
.k, .kn, .kc {{ color: #b34700 }} .s1, .s2, .sa, .si, .sd {{ color: #007a5a }}
.c1 {{ color: var(--mute) }}
@media screen and (prefers-color-scheme: dark) {{ .k, .kn, .kc {{ color: #ff9d5c }}
  .s1, .s2, .sa, .si, .sd {{ color: #5ad1ae }} }}
</style></head><body>
{body}
</body></html>
"""


def with_formulas(text):
    """Markdown with its LaTeX as MathML."""
    text = re.sub(r"\$\$(.+?)\$\$", lambda m: f"\n\n<p class=formula>{formula(m[1])}</p>\n\n",
                  text, flags=re.S)
    return re.sub(r"\$([^$\n]+?)\$", lambda m: formula(m[1], "inline"), text)


def page(path):
    """A notebook, executed, as a page."""
    book = nbformat.read(path, 4)
    NotebookClient(book, timeout=600, resources={"metadata": {"path": HERE}}).execute()
    for cell in book.cells:
        if cell.cell_type == "markdown":  # the page lies two folders below the project's
            cell.source = with_formulas(cell.source).replace("](../", "](../../")
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(book)
    return PAGE.format(title=html.escape(f"Lesson {path.stem[-1]}: {book.metadata.title}"),
                       body="\n".join(line.rstrip() for line in body.strip().splitlines()))


if __name__ == "__main__":
    out = HERE.parent / "docs/lessons"
    out.mkdir(exist_ok=True)
    for path in sorted(HERE.glob("lesson_?.ipynb")):
        (out / f"{path.stem}.html").write_text(page(path), encoding="utf-8")
        print("wrote", out / f"{path.stem}.html", flush=True)
