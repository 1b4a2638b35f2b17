"""README's map points at lines that carry their numbers, its commands name what exists, and the
tables of results/README.md are those of the record.

`python tests/test_readme.py [out]` writes the map and the tables anew, after recording the finished
experiments of `out` in results/toy/, or the run on HH-RLHF that it is in results/hh_smollm2/, or in
results/hh_smollm2_rounds/ where it has a second round of PPO.
"""
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from conftest import run  # noqa: E402
from PIL import Image  # noqa: E402

from lab import formats, page, reader  # noqa: E402
from lab.manifest import finished, in_order  # noqa: E402

README, RECORD = ROOT / "README.md", ROOT / "results/README.md"
TOY, HH = ROOT / "results/toy", ROOT / "results/hh_smollm2"
ROUNDS = ROOT / "results/hh_smollm2_rounds"
DRAWN = "lab/figures.toml"
# label: (file, text of the line, what); Figure 18 has no line
MAP = {e["name"]: (*e["at"], e["what"]) if "at" in e else (None, None, e["what"])
       for e in reader.ENTRIES if "what" in e}
MAP |= {f"{kind} {n}": (DRAWN, f'title = "{kind} {n}: ', "") for kind, n in re.findall(
    r'title = "(Figure|Table) (\d+): ', (ROOT / DRAWN).read_text(encoding="utf-8"))}


def the_map():
    """The rows of README's map, each with the first line of its file that has its text."""
    rows = ["| paper | line | |", "|---|---|---|"]
    order = sorted(MAP, key=lambda k: (("Eq.", "Algorithm", "Figure", "Table").index(
        k.split()[0]), int(k.split()[1])))
    for label in order:
        file, text, what = MAP[label]
        if not file:
            rows.append(f"| {label} | | {what} |")
            continue
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        n = next(i for i, line in enumerate(lines, 1) if text in line)
        if file == DRAWN:
            what = re.search(r": (.*)\"", lines[n - 1])[1]
        rows.append(f"| {label} | [{file}:{n}]({file}#L{n}) | {what} |")
    return "\n".join(rows)


def recorded(name, folder=TOY):
    return json.loads((folder / f"{name}.json").read_text())


def ledger():
    """The verdict on each claim, and what a run on real data has measured of it."""
    def measured(e):
        if "values" not in e:
            return ""
        one = e["interval"][0] == e["interval"][1]  # one curve of one seed has no interval
        return page.number(e["mean"]) + f" ({page.span(e)})" * (not one)
    real = {e["id"]: measured(e) for folder in (ROUNDS, HH)  # where both have it, HH's
            for e in recorded("ledger", folder)["claims"] if measured(e)}
    n = recorded("metrics", HH)["out_hh"]["00_data"]["rows"]["train"]
    rows = [["claim", "", "verdict", "measured, 95 % interval", "holds if",
             f"HH-RLHF, SmolLM2-135M, n = {n:,}"]]
    rows += [[e["id"], e["claim"], f"**{e['verdict']}**",
              f"{e['quantity']}: {measured(e)}".replace("|", "\\|"), page.bounds(e["criterion"]),
              real.get(e["id"], "")] for e in recorded("ledger")["claims"]]
    return markdown(rows)


def runs():
    """What made the record."""
    lines = ["Heads as `run_all.sh verify` prints them."]
    for folder in (TOY, HH, ROUNDS):
        commits = ", ".join(c[:7] for c in recorded("metrics", folder)["git_commits"])
        lines += ["", f"Commits {commits}, commands in `results/{folder.name}/commands.txt`:", "",
                  *(f"- {run[0]}: {run[-3]} minutes of stages, {run[-2]}; head `{run[-1]}`"
                    for run in recorded("ledger", folder)["runs"][1:])]
    return "\n".join(lines)


def markdown(rows):
    return "\n".join(["| " + " | ".join(map(str, rows[0])) + " |", "|" + "---|" * len(rows[0]),
                      *("| " + " | ".join(map(str, row)) + " |" for row in rows[1:])])


BLOCKS = {README: {"map": the_map}, RECORD: {
    "ledger": ledger, "runs": runs, "table 3": lambda: markdown(recorded("tables")["table_3"]),
    "variants": lambda: markdown(recorded("tables")["variants"]),
    "overoptimised": lambda: markdown(recorded("tables")["overoptimised"])}}


def filled(path):
    text = path.read_text(encoding="utf-8")
    for name, make in BLOCKS[path].items():
        text, count = re.subn(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
                              lambda m: m[1] + make() + "\n" + m[2], text, flags=re.DOTALL)
        assert count == 1, f"{path} has no place for {name}"
    return text


def test_tables_are_those_of_the_code_and_the_record():
    for path in BLOCKS:
        assert path.read_text(encoding="utf-8") == filled(path), "run: python tests/test_readme.py"


def test_every_line_of_the_map_carries_its_number():
    rows = re.findall(r"^\| (\w+\.?) (\d+) \| \[([\w./]+):(\d+)\]\(([\w./]+)#L(\d+)\) \|",
                      README.read_text(), flags=re.MULTILINE)
    assert {(kind, int(n)) for kind, n, *_ in rows} == {
        *(("Eq.", n) for n in range(1, 18)), ("Algorithm", 1), *(("Table", n) for n in (1, 2, 3)),
        *(("Figure", n) for n in range(1, 29) if n != 18)}
    for kind, n, file, line, linked, anchor in rows:
        assert (file, line) == (linked, anchor)
        text = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        word = r"Eqs?\." if kind == "Eq." else kind
        assert re.search(rf"{word}[\d, and to]*\b{n}\b", text), f"{kind} {n}: {text}"


def test_the_reader_is_that_of_the_sources():
    """Made anew it is the same; every number of the paper is in it once, with code or a reason."""
    text = reader.PAGE.read_text(encoding="utf-8")
    assert text == reader.page(), "run: python -m lab.reader"
    titles = re.findall(r"<h2[^>]*>(\w+\.?) (\d+): ", text)
    assert sorted(titles) == sorted([
        *(("Eq.", str(n)) for n in range(1, 18)), ("Algorithm", "1"),
        *(("Table", str(n)) for n in (1, 2, 3)), *(("Figure", str(n)) for n in range(1, 29))])
    assert text.count("<pre") == len(titles) - 1 and text.count("<math") == 17  # no line of 18
    marked = re.findall(r"<b>(.*)</b>", text)
    assert len(marked) == 19 and text.count("<section") == text.count("</section>") == len(titles)


def commands():
    """README's command lines, without their comments."""
    blocks = re.findall(r"^```\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


def test_commands_are_taken_by_their_scripts(tmp_path):
    """Each script exists and each flag is one of its own, by its help."""
    assert len(commands()) >= 15 and README.read_text().count("\n") <= 180
    helps = {}
    for words in commands():
        if words[0] == "source":
            continue
        script = ROOT / words[1]
        assert script.is_file(), words
        if script not in helps:
            runner = ["env", "bash"] if script.suffix == ".sh" else ["python"]
            helps[script] = run(*runner, script, "--help").stdout
        for flag in [w for w in words[2:] if w.startswith("--") and w != "--help"]:
            assert re.search(rf"{flag}(?![\w-])", helps[script]), (words, flag)


def record(out):
    """results/ from a finished run or experiments, and their report; no text, no weights."""
    runs = [path.parent for path in sorted(out.glob("*/run.json"))]
    rounds = (out / "06_ppo/round_1").is_dir()
    folder, runs = (TOY, runs) if runs else (ROUNDS if rounds else HH, [out])
    if folder != TOY:
        assert "hh_harmless" in (out / "run.json").read_text(), f"{out} is no run on HH-RLHF"
    assert (out / "09_report/ledger.json").exists(), f"{out} has no report"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("ledger.json", "tables.json"):
        shutil.copy(out / "09_report" / name, folder)
    for path in (out / "09_report/figures").glob("*.png"):
        Image.open(path).convert("RGB").quantize(64).save(folder / path.name, optimize=True)
    manifests = {run.name: {name: json.loads((run / name / "manifest.json").read_text())
                            for name in finished(run)} for run in runs}
    commits = sorted({m["git_commit"] for stages in manifests.values() for m in stages.values()})
    (folder / "metrics.json").write_text(json.dumps({
        "git_commits": commits, "packages": manifests[runs[0].name]["01_sft"]["packages"],
        **{run: {name: m["metrics"] for name, m in stages.items()}
           for run, stages in manifests.items()}}, indent=1) + "\n")
    lines = []
    for run, stages in manifests.items():
        for name in in_order(stages):
            words = [w for w in shlex.split(stages[name]["command"])
                     if not w.startswith("--local_rank")]
            words[words.index("--out") + 1] = f"out/{run}" if folder == TOY else run
            lines.append(shlex.join(["deepspeed", *words]) + "\n")
    (folder / "commands.txt").write_text("".join(dict.fromkeys(lines)))
    if folder == HH:  # for whoever has the pairs
        scores = [{k: row[k] for k in ("id", *formats.SCORES)} for split in ("train", "valid") for
                  row in map(json.loads, (out / f"03_strength/{split}.jsonl").open())]
        (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        record(Path(sys.argv[1]))
    for path in BLOCKS:
        path.write_text(filled(path), encoding="utf-8")
