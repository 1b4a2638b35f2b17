"""The paper beside the code: docs/reader.html, made from lab/reader.toml, lab/figures.toml, the
recorded pictures and the sources themselves.

    python -m lab.reader
"""
import ast
import inspect
import re
import tomllib
from pathlib import Path

from latex2mathml.converter import convert

from lab import figures
from lab.base import HERE, fill, write_text

MOST = 45  # lines of code of an entry
PAPER = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
ENTRIES = [{"name": name, "section": section, **PAPER.get(name, {})}
           for section, *names in PAPER["order"] for name in names]
PAGE = HERE / "docs/reader.html"


def formula(latex, display="block"):
    """LaTeX as MathML; a prime is not raised, for the character is."""
    return re.sub(r"<msup>(<mi>[^<]*</mi>)(?:<mrow>)?<mi>&#x02032;</mi>(?:</mrow>)?</msup>",
                  r"<mrow>\1<mo>&#x02032;</mo></mrow>", convert(latex, display=display))


def find(file, text):
    """(the file's lines, number of the first line that has the text)."""
    lines = (HERE / file).read_text(encoding="utf-8").splitlines()
    return lines, next(i for i, line in enumerate(lines, 1) if text in line)


def around(file, lines, n):
    """(first, last) of the smallest function, class or docstring of a file that has line n; of some
    lines about n where that is long."""
    spans = [(1, len(lines))]
    if file.endswith(".py"):
        for node in ast.walk(ast.parse("\n".join(lines))):
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            named = isinstance(node, (ast.FunctionDef, ast.ClassDef))
            if (named or docstring and node.col_offset == 0) and \
                    node.lineno <= n <= node.end_lineno:
                spans.append((node.lineno, node.end_lineno))
    first, last = min(spans, key=lambda span: span[1] - span[0])
    if last - first >= MOST:
        first = max(first, n - MOST // 3)
        last = min(last, first + MOST - 1)
    return first, last


def of_code(entry):
    """An equation or an algorithm: its formula, and the lines about the one with its number."""
    out = {"title": f"{entry['name']}: {entry['what']}", "says": entry["says"]}
    if "formula" in entry:
        out["formula"] = formula(entry["formula"])
    if "at" in entry:
        file, text = entry["at"]
        lines, n = find(file, text)
        first, last = around(file, lines, n)
        out |= {"place": {"href": f"../{file}", "text": f"{file}:{n}"},
                "code": [{"text": line, "marked": i == n}
                         for i, line in enumerate(lines[first - 1:last], first)]}
    return out


def of_figure(entry):
    """A figure or table: what the paper saw, our picture, and how its numbers are read."""
    title, saw, _, data, _ = figures.FIGURES[entry["name"]]
    lines, n = inspect.getsourcelines(data)
    image = f"results/toy/{entry['name']}.png"
    return {"title": title, "says": f"The paper: {saw}" if saw else "",
            "image": f"../{image}" if (HERE / image).exists() else None,
            "place": {"href": "../lab/figures.py", "text": f"lab/figures.py:{n}"},
            "code": [{"text": line.rstrip("\n"), "marked": False} for line in lines]}


def page():
    """The text of docs/reader.html."""
    entries = []
    for entry in ENTRIES:
        of = of_figure if entry["name"] in figures.FIGURES else of_code
        shown = of(entry)
        entries.append({"id": entry["name"].lower().replace(" ", "_").replace(".", ""),
                        "section": entry["section"], "name": shown["title"].split(":")[0], **shown})
    return fill("reader.html", entries=entries)


if __name__ == "__main__":
    write_text(PAGE, page())
