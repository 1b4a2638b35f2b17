"""One page of a run, or of experiments over several seeds: what was made in pictures, every figure
and table beside what the paper saw, the commands and numbers behind them, the ledger (first, where
seeds make it one). What was not measured is one folded line. page.html is its form."""
import base64
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

from lab import experiments, figures, judges, status
from lab.base import die, fill, log, progress, read_json, write_text
from lab.claims import MIN_SEEDS, VERDICTS, ledger
from lab.manifest import finished, head, recorded_flags

TEXTS = ("table_1", "samples")
# what a run's page opens with; all else is in the paper's order
OPENING = ("figure_01", "table_1", "accuracies", "table_2", "parting", "samples")
LABELLED = ("figure_03", "figure_08", "accuracies")  # by the judge's labels too
SCALE = 1.6  # pixels of a picture to one of the page


def number(x):
    return f"{x:.2g}" if abs(x) < 0.01 else f"{x:.3f}"


def span(e):
    """A claim's interval."""
    return f"{number(e['interval'][0])} to {number(e['interval'][1])}"


def bounds(criterion):
    """(low, high) for people."""
    low, high = criterion
    if low is not None and high is not None:
        return f"{low:g} to {high:g}"
    return f"> {low:g}" if low is not None else f"< {high:g}"


def commands(run, patterns):
    """The recorded command lines of the stages that a figure comes from."""
    found = sorted({p for pattern in patterns for p in run.path.glob(f"{pattern}/manifest.json")})
    return list(dict.fromkeys(shlex.join(["deepspeed", m["script"], *recorded_flags(m)])
                              for m in map(read_json, found)))


def judged(path):
    """{stage: its judge, in a sentence}: of policies and, where one that reads did, of labels."""
    found = {stage: read_json(path / stage / "manifest.json")["metrics"]
             for stage in finished(path) if stage == "03_strength" or stage[:2] == "08"}
    reports = {stage: m.get("report", m.get("judge")) for stage, m in found.items()}
    return {stage: judges.describe(r) if "items" in r else f"judge {found[stage]['judge']}"
            for stage, r in reports.items() if r}


def what_was_run(runs):
    """Preset, data, model, judge, minutes, hardware and head of every run directory."""
    rows = [["run", "preset", "data", "model", "judge", "minutes", "hardware",
             "head (run_all.sh verify)"]]
    for path in [p for run in runs for p in (run.path, run.summary) if p]:
        manifests = {name: read_json(path / name / "manifest.json") for name in finished(path)
                     if name != "09_report"}
        info, last = read_json(path / "run.json"), manifests.get(
            "01_sft", {"hardware": "", "world_size": "0"})
        rows.append([
            path.name, info["preset"] + (f", limit {info['limit']}" if info.get("limit") else ""),
            ", ".join(map(str, info["preferences"])), info["model"],
            "; ".join(f"{stage}: {said}" for stage, said in judged(path).items()),
            f"{sum(m['seconds'] for m in manifests.values()) / 60:.1f}",
            f"{last['hardware']}, {last['world_size']} process(es)",
            head(manifests)])
    return rows


def in_one_line(run):
    """A run in a sentence, from what stays the same when it is replayed."""
    info, rounds = read_json(run.path / "run.json"), len(figures.rounds(run, "07_metarm"))
    sources = "The embedded world" if info["preferences"] == ["toy"] else ", ".join(
        Path(s).name for s in map(str, info["preferences"]))
    model = "a model of half a million parameters" if info["model"] == "tiny" else \
        f"{Path(info['model']).name} and its reward models"
    return (f"{sources}, {model}, the {info['preset']} preset, "
            f"{rounds or 'no'} round{'s' * (rounds != 1)} of MetaRM")


def not_there_yet(run):
    """Stages of the pipeline that this run has not finished."""
    made = set(finished(run.path))
    return [] if "08_evaluate" in made else [  # which stands behind the last round
        experiments.name_of(names) for names, *_ in status.stages(run.path)[:-1]
        if not set(names) <= made]


def collect(runs, show_texts):
    """({figure: {run: data}}, {figure: why it is not there}); a run that lacks a figure is left out
    of it."""
    collected, absent = {}, {}
    for name, (_, _, made, data, _) in progress(figures.FIGURES.items(), "reading"):
        if name in TEXTS and not show_texts:
            absent[name] = "dialogues of your own data are not shown (--texts shows them)"
            continue
        for run in runs:
            try:
                if not (found := data(run)):
                    raise figures.Missing(f"{run.path} has no {' or '.join(made)} yet")
                collected.setdefault(name, {})[run.path.name] = found
            except figures.Missing as missing:
                absent[name] = str(missing)
    return collected, absent


def sections(runs, entries, collected, absent, folder):
    """What page.html shows of each figure and table; draws them into `folder`."""
    judge = judged(runs[0].path)
    for name, (title, saw, made, _, draw) in progress(figures.FIGURES.items(), "drawing"):
        place = re.match(r"(?:Figure|Table|Equation) \d+", title)
        mine = re.compile(rf"\b{place[0].replace('Equation', 'Eq.')}\b") if place else None
        s = SimpleNamespace(name=name, title=title, saw=saw, absent=absent.get(name), table=[],
                            image=None, data=None, commands="", opening=name in OPENING,
                            judge=judge.get("03_strength" if name in LABELLED else next(
                                (stage for stage in reversed(made) if stage[:2] == "08"), None)))
        s.ours = [e for e in entries if "values" in e and mine and mine.search(e["where"])]
        if name in collected:
            seeds = list(collected[name].values())
            figure, s.table = draw(seeds) if draw else (None, [])
            s.commands, s.absent = "\n".join(commands(runs[0], made)), None
            s.data = seeds[0] if name in TEXTS else None
            if figure:
                figure.savefig(folder / f"{name}.png", dpi=90 * SCALE)
                figures.plt.close(figure)
                picture = (folder / f"{name}.png").read_bytes()
                s.width = round(int.from_bytes(picture[16:20], "big") / SCALE)  # PNG's own width
                s.image = base64.b64encode(picture).decode()
        yield s


def page(runs, entries, collected, absent, folder):
    """(index.html's text, {figure: rows of the table behind it})."""
    words = dict(zip(VERDICTS, ("hold", "fail", "are open", "were not measured")))
    count = [f"{n} {word}" for v, word in words.items()
             if (n := sum(e["verdict"] == v for e in entries))]
    few = f" Only {len(runs)} seed(s) were run: below {MIN_SEEDS} every claim stays open." \
        if len(runs) < MIN_SEEDS else ""
    shown = {s.name: s for s in sections(runs, entries, collected, absent, folder)}
    flags = recorded_flags(read_json(runs[0].path / "00_data/manifest.json"))
    text = fill(
        "page.html", runs=what_was_run(runs), entries=entries, count=", ".join(count), few=few,
        several=len(runs) > 1 or runs[0].summary is not None, seeds=len(runs),
        line=in_one_line(runs[0]), coming=not_there_yet(runs[0]),
        opening=[shown[n] for n in OPENING if not shown[n].absent],
        sections=[s for s in shown.values() if not (s.opening or s.absent)],
        absent=[s for s in shown.values() if s.absent], number=number, span=span, bounds=bounds,
        mean=figures.MEAN, std=figures.STD, command=re.sub(" --seed[ =][0-9]+", "", shlex.join(
            ["bash", "run_all.sh", "experiments", *flags, "--out", "out_experiments"])))
    return text, {s.name: s.table for s in shown.values() if s.table}


def find_runs(out):
    """Runs of a directory: OUT/seed_0, seed_1, ... with their summary_S, or OUT itself."""
    seeds = sorted(
        int(p.parent.name[5:]) for p in out.glob("seed_*/run.json") if p.parent.name[5:].isdigit())
    if (out / "run.json").exists():
        return [SimpleNamespace(path=out, summary=None)]
    if not seeds:
        die(f"{out} holds no run: bash run_all.sh --out {out} makes one")
    done = {s for s in seeds if (out / f"summary_{s}/08_evaluate/manifest.json").exists()}
    return [SimpleNamespace(path=out / f"seed_{s}", summary=out / f"summary_{s}" if s in done
                            else None) for s in seeds]


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
