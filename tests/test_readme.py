"""README's map names real places, and its numbers are those of the recorded run and of the code.

`python tests/test_readme.py [out]` writes the tables between README's markers anew, after recording the finished
experiments of `out` in results/toy/.
"""
import ast
import json
import re
import shlex
import shutil
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
README, TOY = ROOT / "README.md", ROOT / "results/toy"
STAGES = ["00_data", "01_sft", "02_rm_ensemble", "03_strength", "04_rm_denoise", "05_rm_contrastive", "06_ppo",
          "07_metarm", "08_evaluate"]


def hyperparameters():
    """One line a stage, name paper / toy, from the tables at the top of the scripts."""
    lines = ["| stage | name paper / toy (one value: both) |", "|---|---|"]
    for stage in STAGES:
        cells = [f"{name} {paper}" if paper == toy else f"{name} {paper} / {toy}"
                 for name, (paper, toy, _) in import_module(stage).HPARAMS.items()]
        lines.append(f"| `{stage}` | {' · '.join(cells)} |")
    return "\n".join(lines)


def recorded(name):
    return json.loads((TOY / f"{name}.json").read_text())


def ledger():
    """The verdict on each claim."""
    report = import_module("09_report")
    lines = ["| claim | | verdict | measured, 95 % interval | holds if |", "|---|---|---|---|---|"]
    for e in recorded("ledger")["claims"]:
        value = f"{report.number(e['mean'])} ({report.number(e['interval'][0])} to {report.number(e['interval'][1])})"
        lines.append(f"| {e['id']} | {e['claim']} | **{e['verdict']}** | {e['quantity'].replace('|', chr(92) + '|')}: "
                     f"{value} | {report.bounds(e['criterion'])} |")
    return "\n".join(lines)


def runs():
    """What made the record."""
    ledger = recorded("ledger")
    lines = [f"- {run[0]}: {run[4]} minutes of stages, {run[5]}; head `{run[6]}`" for run in ledger["runs"][1:]]
    commits = ", ".join(c[:7] for c in recorded("metrics")["git_commits"])
    return "\n".join([f"Commits {commits}, commands in `results/toy/commands.txt`, heads as `run_all.sh verify` prints them:",
                      "", *lines])


def markdown(rows):
    return "\n".join(["| " + " | ".join(map(str, rows[0])) + " |", "|" + "---|" * len(rows[0]),
                      *("| " + " | ".join(map(str, row)) + " |" for row in rows[1:])])


def table_3():
    return markdown(recorded("tables")["table_3"])


def eta():
    return markdown(recorded("tables")["joint"][:10])


BLOCKS = {"ledger": ledger, "runs": runs, "table 3": table_3, "hyperparameters": hyperparameters, "eta": eta}


def filled(text):
    for name, make in BLOCKS.items():
        text, count = re.subn(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: m[1] + make() + "\n" + m[2], text,
                              flags=re.DOTALL)
        assert count == 1, f"README has no place for {name}"
    return text


def test_numbers_are_those_of_the_record():
    assert README.read_text() == filled(README.read_text()), "run: python tests/test_readme.py"


def test_every_place_of_the_map_exists_and_carries_the_number():
    rows = re.findall(r"^\| ([^|]+) \| `([\w./]+\.py)` \| `(\w+)` \|$", README.read_text(), flags=re.MULTILINE)
    assert len(rows) >= 20
    for numbers, file, function in rows:
        source = (ROOT / file).read_text()
        node = next((n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and n.name == function), None)
        assert node is not None, f"{file} has no function {function}"
        body = ast.get_source_segment(source, node)
        for kind, listed in re.findall(r"(Eqs?\.|Figure|Table|Algorithm) ([\d, ]*\d)", numbers):
            for number in re.findall(r"\d+", listed):
                word = "Eqs?\\." if kind.startswith("Eq") else kind
                assert re.search(rf"{word}s?[\d, and to]*\b{number}\b", body), f"{file}:{function} lacks {kind} {number}"


def test_commands_name_files_that_exist():
    for file in re.findall(r"(?:bash|python|deepspeed) +([\w./]+\.(?:sh|py))", README.read_text()):
        assert (ROOT / file).exists(), file


def record(out):
    """results/toy/ from finished experiments and their report."""
    import audit
    shutil.rmtree(TOY, ignore_errors=True)
    TOY.mkdir(parents=True)
    for name in ("ledger.json", "tables.json"):
        shutil.copy(out / "09_report" / name, TOY)
    for path in (out / "09_report/figures").glob("*.png"):
        shutil.copy(path, TOY)
    found = sorted(p.parent for p in out.glob("*/run.json"))
    manifests = {run.name: {name: json.loads((run / name / "manifest.json").read_text()) for name in audit.finished(run)}
                 for run in found}
    commits = sorted({m["git_commit"] for stages in manifests.values() for m in stages.values()})
    (TOY / "metrics.json").write_text(json.dumps({
        "git_commits": commits, "packages": manifests["seed_0"]["00_data"]["packages"],
        **{run: {name: m["metrics"] for name, m in stages.items()} for run, stages in manifests.items()}}, indent=1) + "\n")
    lines = []
    for run, stages in manifests.items():
        for name in audit.in_order(stages):
            words = [w for w in shlex.split(stages[name]["command"]) if not w.startswith("--local_rank")]
            words[words.index("--out") + 1] = f"out/{run}"
            lines.append(shlex.join(["deepspeed", *words]) + "\n")
    (TOY / "commands.txt").write_text("".join(dict.fromkeys(lines)))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if len(sys.argv) == 2:
        record(Path(sys.argv[1]))
    README.write_text(filled(README.read_text()))
