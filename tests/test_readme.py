"""README's map names real places, and its numbers are those of the recorded run and of the code.

`python tests/test_readme.py [out eta_sweep]` writes the tables between README's markers anew, after recording the
finished default run and the sweep (README, "MetaRM's eta") in results/toy/.
"""
import ast
import json
import re
import shutil
import sys
from datetime import datetime
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


def headline():
    """The recorded run's figures that answer the paper's first questions."""
    m = json.loads((TOY / "metrics.json").read_text())
    strength, denoise, evaluation = m["03_strength"], m["04_rm_denoise/figures"], m["08_evaluate"]["mean_score"]
    tenth = {n: m[f"04_rm_denoise/{n}"]["accuracy_judge"] for n in ("weakest_tenth", "weakest_tenth_flipped")}
    lines = [
        f"- Share of training pairs with mean < 0: {strength['share_mean_below_zero']:.2f} (paper: about 0.25). "
        f"Labels confirmed by the judge in the weakest, near-zero and strongest {strength['consistency_group_size']} "
        f"validation pairs: {strength['consistency_weakest']:.2f}, {strength['consistency_near_zero']:.2f}, "
        f"{strength['consistency_strongest']:.2f} (paper: 0.164, 0.544, 0.956).",
        "- Accuracy on judge-labelled validation pairs: " + ", ".join(
            f"{name} {values['accuracy_judge']:.3f}" for name, values in denoise.items()) +
        f"; trained on the weakest tenth alone {tenth['weakest_tenth']:.2f}, on the same tenth flipped "
        f"{tenth['weakest_tenth_flipped']:.2f}.",
        "- Mean gold on the evaluation prompts, " + "; ".join(
            f"{policy}: " + ", ".join(f"{name.removeprefix('eval_')} {value:.2f}" for name, value in scores.items()
                                      if name.startswith("eval_")) for policy, scores in evaluation.items()) + ".",
        "- MetaRM's J at theta beside the vanilla model's, held-back samples: " + ", ".join(
            f"round {name[-1]} {v['J_theta']:.3f} / {v['J_vanilla']:.3f}" for name, v in m.items()
            if name.startswith("07_metarm")) + ". It does not rise (see \"MetaRM's eta\").",
        f"- It took {m['minutes']:.1f} minutes on {m['hardware']}."]
    return "\n".join(lines)


def tables():
    return (TOY / "tables.md").read_text().strip()


def eta():
    lines = ["| eta | J at theta | J at theta' | accuracy, judge | accuracy, original |", "|---:|---:|---:|---:|---:|"]
    for row in json.loads((TOY / "eta_sweep.json").read_text()):
        lines.append(f"| {row['eta']:g} | {row['J_theta']:.4f} | {row['J_theta_prime_last_step']:.4f} | "
                     f"{row['accuracy_judge']:.3f} | {row['accuracy_original']:.3f} |")
    return "\n".join(lines)


BLOCKS = {"tables": tables, "headline": headline, "hyperparameters": hyperparameters, "eta": eta}


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


def record(out, eta_sweep):
    """results/toy/ from a finished run and the sweep."""
    import audit
    TOY.mkdir(parents=True, exist_ok=True)
    manifests = {name: json.loads((out / name / "manifest.json").read_text()) for name in audit.finished(out)}
    times = [[datetime.fromisoformat(m[k]) for m in manifests.values()] for k in ("start", "end")]
    data = manifests["00_data"]
    (TOY / "metrics.json").write_text(json.dumps({
        "head": audit.head(manifests), "minutes": round((max(times[1]) - min(times[0])).total_seconds() / 60, 1),
        "hardware": manifests["01_sft"]["hardware"], "seed": data["seed"], "packages": data["packages"],
        "git_commit": data["git_commit"], **{name: m["metrics"] for name, m in manifests.items()}}, indent=1) + "\n")
    for source in ("08_evaluate/tables.md", "03_strength/figure_03.png"):
        shutil.copy(out / source, TOY)
    sweep = [json.loads(p.read_text()) for p in eta_sweep.glob("eta_*.json")]
    keys = ("J_theta", "J_theta_prime_last_step", "J_theta_last_step", "J_vanilla", "accuracy_judge", "accuracy_original")
    (TOY / "eta_sweep.json").write_text(json.dumps(sorted((
        {"eta": m["hyperparameters"]["eta"], **{k: m["metrics"][k] for k in keys}} for m in sweep),
        key=lambda row: row["eta"]), indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if len(sys.argv) == 3:
        record(Path(sys.argv[1]), Path(sys.argv[2]))
    README.write_text(filled(README.read_text()))
