"""One page of a run, or of experiments over several seeds: what was run, the ledger, every figure
and
table beside what the paper saw, and the commands and numbers behind them."""
import base64
import html
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from lab import figures
from lab.base import die, log, progress, read_json, write_text
from lab.claims import MIN_SEEDS, VERDICTS, ledger
from lab.manifest import finished, head

TEMPLATE = Path(__file__).with_name("page.html")
TEXTS = ("table_1", "samples")


def escape(value):
    return html.escape(str(value))


def html_table(rows):
    """Rows, the first the head → a table that scrolls inside the page when it is wide."""
    def line(row, tag):
        return "<tr>" + "".join(f"<{tag}>{escape(c)}</{tag}>" for c in row) + "</tr>"
    body = "".join(line(row, "td") for row in rows[1:])
    return f"<div class=wide><table>{line(rows[0], 'th')}{body}</table></div>"


def folded(title, content):
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def number(x):
    return f"{x:.2g}" if abs(x) < 0.01 else f"{x:.3f}"


def span(e):
    """A claim's interval."""
    return f"{number(e['interval'][0])} to {number(e['interval'][1])}"


def badge(e):
    return f"<span class='v {e['verdict'].split()[0]}'>{e['verdict']}</span>"


def bounds(criterion):
    """(low, high) for people."""
    low, high = criterion
    if low is not None and high is not None:
        return f"{low:g} to {high:g}"
    return f"> {low:g}" if low is not None else f"< {high:g}"


def ledger_table(entries):
    titles = ("claim, section", "", "verdict", "mean, 95 %", "each seed",
              "what is measured; holds if")
    rows = ["<tr>" + "".join(f"<th>{title}</th>" for title in titles) + "</tr>"]
    for e in entries:
        if "values" in e:
            seeds = ", ".join(map(number, e["values"].values()))
            result = f"<td class=n>{number(e['mean'])}<br><span class=mute>{span(e)}</span></td>" \
                     f"<td class=n>{seeds}</td>"
        else:
            result = f"<td colspan=2 class=mute>{escape(e['reason'])}</td>"
        more = f"<br><span class=mute>paper: {escape(e['paper'])}</span>" if e["paper"] else ""
        more += f"<br><i>{escape(e['note'])}</i>" if e["note"] else ""
        rows.append(
            f"<tr id={e['id']}><td>{e['id']}<br><span class=mute>{escape(e['where'])}</span></td>"
            f"<td>{escape(e['claim'])}{more}</td><td>{badge(e)}</td>{result}"
            f"<td>{escape(e['quantity'])}<br><b>{escape(bounds(e['criterion']))}</b></td></tr>")
    return f"<div class=wide><table class=ledger>{''.join(rows)}</table></div>"


def texts(name, data):
    """Table 1 or the answers of each round, from the first seed."""
    if name == "table_1":
        return "".join(
            f"<h3>{kind}: mean {pair[figures.MEAN]:.2f}, std {pair[figures.STD]:.2f}</h3><pre>" +
            "\n\n".join(f"{key}: {escape(pair[key].strip())}"
                        for key in ("prompt", "chosen", "rejected")) + "</pre>"
            for kind, pair in data.items())
    out = "<p>The reward is each round's own reward model's; where it rises and gold falls, the " \
          "policy has learned the model's mistakes.</p>"
    for sample in data.values():
        rows = [["policy", "answer", "reward", "gold"]] + [
            [a["policy"], a["response"], f"{a['reward']:.2f}",
             f"{a['gold']:.2f}" if "gold" in a else ""] for a in sample["answers"]]
        out += f"<pre>{escape(sample['prompt'].strip())}</pre>{html_table(rows)}"
    return out


def commands(run, patterns):
    """The recorded command lines of the stages that a figure comes from."""
    found = sorted({p for pattern in patterns for p in run.path.glob(f"{pattern}/manifest.json")})
    lines = dict.fromkeys(" ".join(w for w in shlex.split(read_json(p)["command"])
                                   if not w.startswith("--local_rank")) for p in found)
    return [f"deepspeed {line}" for line in lines]


def what_was_run(runs):
    """Preset, data, model, minutes, hardware and head of every run directory."""
    rows = [["run", "preset", "data", "model", "minutes", "hardware", "head (run_all.sh verify)"]]
    for path in [p for run in runs for p in (run.path, run.summary) if p]:
        manifests = {name: read_json(path / name / "manifest.json") for name in finished(path)
                     if name != "09_report"}
        info, last = read_json(path / "run.json"), manifests.get(
            "01_sft", {"hardware": "", "world_size": "0"})
        rows.append([
            path.name, info["preset"] + (f", limit {info['limit']}" if info.get("limit") else ""),
            ", ".join(map(str, info["preferences"])), info["model"],
            f"{sum(m['seconds'] for m in manifests.values()) / 60:.1f}",
            f"{last['hardware']}, {last['world_size']} process(es)",
            head(manifests)])
    return rows


def ours(entries, title):
    """The ledger's lines on a figure or table, by its number."""
    place = re.match(r"(?:Figure|Table|Equation) \d+", title)
    mine = re.compile(rf"\b{place[0].replace('Equation', 'Eq.')}\b") if place else None
    lines = []
    for e in [e for e in entries if mine and mine.search(e["where"])]:
        result = f"<span class=mute>({escape(e['quantity'])}: {number(e['mean'])}, {span(e)})" \
                 "</span>" if "values" in e else ""
        lines.append(f"<li><a href=#{e['id']}>{e['id']}</a> {badge(e)} {escape(e['claim'])} "
                     f"{result}</li>")
    return f"<p><b>Ours:</b></p><ul>{''.join(lines)}</ul>" if lines else ""


def section(name, entries, body, lines, table):
    """A figure or table: its number, what the paper saw, ours, the commands and the numbers."""
    title, saw, *_ = figures.FIGURES[name]
    paper = f"<p><b>Paper:</b> {escape(saw)}</p>" if saw else ""
    text = f"<section id={name}><h2>{escape(title)}</h2>{paper}{ours(entries, title)}{body}"
    # no claim says what a figure of ours shows
    shown = table and title.startswith("Not in the paper")
    text += html_table(table) if shown else ""
    text += folded("commands", f"<pre>{escape(chr(10).join(lines))}</pre>") if lines else ""
    text += folded("numbers", html_table(table)) if len(table) > 1 and not shown else ""
    return f"{text}</section>"


def collect(runs, show_texts):
    """({figure: {run: data}}, {figure: why it is not there}); a run that lacks a figure is left out
    of it."""
    collected, absent = {}, {}
    for name, (_, _, _, data, _) in progress(figures.FIGURES.items(), "reading"):
        if name in TEXTS and not show_texts:
            absent[name] = "dialogues of your own data are not shown (--texts shows them)"
            continue
        for run in runs:
            try:
                collected.setdefault(name, {})[run.path.name] = data(run)
            except figures.Missing as missing:
                absent[name] = f"not measured: {missing}"
    return {name: data for name, data in collected.items() if data}, absent


def page(runs, entries, collected, absent, folder):
    """(index.html's text, {figure: rows of the table behind it}); draws the figures into
    `folder`."""
    sections, tables = [], {}
    for name, (title, _, made, _, draw) in progress(figures.FIGURES.items(), "drawing"):
        if name not in collected:
            sections.append(
                section(name, entries, f"<p class=mute>{escape(absent[name])}</p>", [], []))
            continue
        seeds = list(collected[name].values())
        figure, table = draw(seeds)
        tables[name] = table
        if figure:
            figure.savefig(folder / f"{name}.png", dpi=90)
            figures.plt.close(figure)
            image = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
            body = f"<img alt=\"{escape(title)}, ours\" src=\"data:image/png;base64,{image}\">"
        elif name in TEXTS:
            body = texts(name, seeds[0])
        else:
            body, table = html_table(table), []
        sections.append(section(name, entries, body, commands(runs[0], made), table))
    words = dict(zip(VERDICTS, ("hold", "fail", "are open", "were not measured")))
    count = [f"{n} {word}" for v, word in words.items()
             if (n := sum(e["verdict"] == v for e in entries))]
    few = f" Only {len(runs)} seed(s) were run: below {MIN_SEEDS} every claim stays open." \
        if len(runs) < MIN_SEEDS else ""
    intro = f"<p>Of {len(entries)} claims: {', '.join(count)}.{few} The criteria were written " \
            "before the experiments were run, but for those whose note says otherwise. The " \
            "intervals are bootstraps over seeds and, in a seed, over pairs or prompts: with so " \
            "few seeds they show the order of the spread, not more.</p>"
    body = f"<h2>What was run</h2><div id=runs>{html_table(what_was_run(runs))}</div>" \
           f"<h2 id=ledger>The ledger</h2>{intro}{ledger_table(entries)}{''.join(sections)}"
    text = TEMPLATE.read_text(encoding="utf-8").replace("BODY", body)
    return text, {name: table for name, table in tables.items() if table}


def find_runs(out):
    """Runs of a directory: OUT/seed_0, seed_1, ... with their summary_S, or OUT itself."""
    seeds = sorted(
        int(p.parent.name[5:]) for p in out.glob("seed_*/run.json") if p.parent.name[5:].isdigit())
    if (out / "run.json").exists():
        return [SimpleNamespace(path=out, seed=read_json(out / "run.json")["seed"], summary=None)]
    if not seeds:
        die(f"{out} holds no run: bash run_all.sh --out {out} makes one")
    done = {s: (out / f"summary_{s}/08_evaluate/manifest.json").exists() for s in seeds}
    return [
        SimpleNamespace(path=out / f"seed_{s}", seed=s,
                        summary=out / f"summary_{s}" if done[s] else None) for s in seeds]


def own_texts(path):
    """Whether a run has dialogues other than the embedded world's."""
    info = read_json(path / "run.json")
    return info.get("world") != "toy" or any(info.get(k) for k in ("sft", "prompts", "ood_prompts"))


def write(run, out, show_texts):
    """Everything that stage 09 writes, into `run.dir`. → {verdict: number of claims}"""
    runs = find_runs(out)
    collected, absent = collect(runs, show_texts or not any(own_texts(r.path) for r in runs))
    folder = run.dir / "figures"
    folder.mkdir()
    for name, data in collected.items():
        write_text(folder / f"{name}.json", json.dumps(data) + "\n")
    entries = ledger(collected)
    record = {"claims": entries, "runs": what_was_run(runs)}
    write_text(run.dir / "ledger.json", json.dumps(record, indent=1) + "\n")
    text, tables = page(runs, entries, collected, absent, folder)
    write_text(run.dir / "index.html", text)
    write_text(run.dir / "tables.json", json.dumps(tables, indent=1) + "\n")
    for e in entries:
        interval = f"{e['mean']:8.3f}  [{e['interval'][0]:.3f}, {e['interval'][1]:.3f}]" \
            if "values" in e else ""
        log(f"{e['id']:5} {e['verdict']:13}{interval}  {e['claim']}")
    return {v: sum(e["verdict"] == v for e in entries) for v in VERDICTS}
