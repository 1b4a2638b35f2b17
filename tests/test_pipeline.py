"""The driver, `bash run_all.sh`: real data, what it skips, prints and refuses."""
import gzip
import hashlib
import html
import json
import os
import re
import shlex
import subprocess
import sys
import time

import pytest
from conftest import ROOT, run

from lab import experiments

REAL = ROOT.parent / "shared/data/hh_harmless_sample.jsonl.gz"
ROWS = experiments.pipeline(1)
STAGES = [experiments.name_of(directories) for directories, *_ in ROWS]


def driver(*flags, check=True):
    """run_all.sh in the active environment (that of the tests)."""
    return run("bash", "run_all.sh", *flags, check=check)


def metrics(out, stage="00_data"):
    return json.loads((out / stage / "manifest.json").read_text())["metrics"]


def one_error(done, *words):
    """Exit code 2 and one line that says all the words."""
    lines = done.stdout.splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith(
        "error: "), done.stdout[-2000:]
    for word in words:
        assert word in lines[0], lines[0]


# ---------------------------------------------------------------- real data

@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The whole pipeline on the real sample, once; without it, on the embedded world. → (out,
    flags, output)."""
    out = tmp_path_factory.mktemp("real") / "out"
    flags = [
        "--preferences", REAL if REAL.exists() else "toy", "--limit", 2, "--rounds", 1,
        "--tensorboard", "--out", out]
    return out, flags, run("env", "bash", "run_all.sh", *flags).stdout


def sample_rows():
    return [json.loads(line) for line in gzip.open(REAL, "rt", encoding="utf-8")]


def test_every_stage_is_complete(real):
    out, _, text = real
    for stage in (stage for directories, *_ in ROWS for stage in directories):
        assert (out / stage / "manifest.json").exists(), stage
    assert not list(out.rglob("*.partial")) and "Traceback" not in text
    assert len(list(out.glob("02_rm_ensemble/rm_*/model.safetensors"))) == 10
    assert {p.name for p in out.glob("04_rm_denoise/*")} == {
        "baseline", "flip", "margin", "flip_margin", "soft_margin"}
    assert {p.name for p in out.glob("05_rm_contrastive/*")} == {
        "simcse", "simcse_diff", "swav", "swav_diff"}
    figures = {p.name for p in out.rglob("figure_*.png")}
    assert {f"figure_{n}.png" for n in ("01", "02", "08", "11", "16")} <= figures
    if not REAL.exists():  # the page's Table 3 is the one that is printed
        rows = json.loads((out / "09_report/tables.json").read_text())["table_3"][1:]
        assert rows and all(f"| {r[0]} | {r[1]} | {r[2]} | {r[3]}% |" in text for r in rows)
    markdown = (out / "08_evaluate/tables.md").read_text()
    # of a single run: most figures need experiments
    page = (out / "09_report/index.html").read_text()
    assert "Figure 2:" in page and page.count(
        "<img ") >= 4 and f"{out}/09_report/index.html" in text
    assert "Table 2" in markdown and "Table 3" in markdown and markdown.strip() in text
    assert metrics(out, "01_sft")["steps"] == metrics(out, "04_rm_denoise/margin")["steps"] == 2
    assert max(metrics(out)["rows"].values()) <= 64 * 2


@pytest.mark.skipif(not REAL.exists(), reason="the real sample lies outside the project")
def test_drop_counts_on_real_data(real):
    counts, seen, kept = {}, set(), 0
    for row in sample_rows():
        (p, c), (q, r) = (re.fullmatch(r"(.*\n\nAssistant:)(.*)", row[k], re.DOTALL).groups()
                          for k in ("chosen", "rejected"))
        c, r = c.strip(), r.strip()
        reason = "prompts differ" if p != q else "empty response" if not c or not r else \
            "identical responses" if c == r else "duplicate pair" if (p, c, r) in seen else None
        seen.add((p, c, r))
        if reason:
            counts[reason] = counts.get(reason, 0) + 1
        else:
            kept += 1
    got = metrics(real[0])
    assert got["drops"] == counts and got["kept"] == kept and got["read"] == 1800


@pytest.mark.skipif(not REAL.exists(), reason="the real sample lies outside the project")
def test_no_row_is_printed(real):
    texts = {piece.strip() for row in sample_rows() for key in ("chosen", "rejected")
             for piece in re.split(r"\n\n(?:Human|Assistant):", row[key])}
    texts = [text for text in texts if len(text) > 30]
    assert len(texts) > 2000 and not [text for text in texts if text in real[2]]


def test_each_stage_is_announced_with_its_command_and_minutes(real):
    out, flags, text = real
    logged = [shlex.split(line) for line in (out / "commands.log").read_text().splitlines()]
    assert len(logged) == len(STAGES)
    assert logged[0] == ["python", "00_data.py", *map(str, flags[:4]), "--out", str(out)]
    # one process needs no launcher
    assert all(command[0] == "python" and command[-2:] == ["--out", str(out)] for command in logged)
    assert logged[-1][1] == "09_report.py"
    for command in logged:
        assert "   " + " ".join(command) in text.splitlines()
    assert text.count("minutes expected: ") == text.count("minutes taken: ") == len(STAGES)


def test_a_complete_run_is_skipped_stage_by_stage(real):
    out, flags, _ = real
    def times():
        return {
            p: p.stat().st_mtime_ns
            for p in out.rglob("*")
            if p.is_file() and p.suffix != ".lock" and p.name != ".lock"}

    before = times()
    start = time.time()
    lines = driver(*flags).stdout.splitlines()
    assert [x for x in lines if x.startswith("==")] == [
        f"== {s} is complete, skipped" for s in STAGES] and time.time() - start < 20
    assert times() == before


def test_from_runs_a_stage_and_all_after_it(real):
    """--from 08: that one and the report run again, to the same bytes."""
    out, flags, _ = real
    tables = (out / "08_evaluate/responses.jsonl").read_bytes()
    text = driver("--from", "08", "--rounds", 1, "--out", out).stdout
    assert text.count("skipped") == len(STAGES) - 2 and "== 08_evaluate: " in text
    assert (out / "08_evaluate/responses.jsonl").read_bytes() == tables


def test_logged_commands_and_stages_work_by_hand(real):
    """A line of commands.log as it stands, plain python, and the same through the launcher: the
    same bytes."""
    out = real[0]
    model = out / "07_metarm/round_1/model.safetensors"
    digests = [hashlib.sha256(model.read_bytes()).hexdigest()]
    logged = next(x for x in (out / "commands.log").read_text().splitlines() if "07_metarm.py" in x)
    assert shlex.split(logged)[-6:] == ["07_metarm.py", "--round", "1", "--tensorboard", "--out",
                                        str(out)]
    launched = ["deepspeed", "--num_gpus", 1, "07_metarm.py", "--round", "1", "--tensorboard",
                "--out", out]
    for command in (["env", *shlex.split(logged)], launched):  # a process of its own
        stamp = model.stat().st_mtime_ns
        run(*command)
        assert model.stat().st_mtime_ns != stamp
        digests.append(hashlib.sha256(model.read_bytes()).hexdigest())
    assert len(set(digests)) == 1


def test_tensorboard_has_the_lines_of_metrics_jsonl(real):
    """In every stage with steps, one number a line and name; outside the manifest, for they hold
    the time."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    out, seen = real[0], set()
    for path in sorted(out.rglob("metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        events = list(path.parent.glob("events.out.tfevents*"))
        assert bool(events) == (str(path.relative_to(out))[:2] in experiments.TRAINED), path
        if events:
            found = EventAccumulator(str(path.parent)).Reload()
            expected = {(name, line["step"]): value for line in lines
                        for name, value in line.items() if name != "step"}
            assert {(name, e.step): e.value for name in found.Tags()["scalars"]
                    for e in found.Scalars(name)} == pytest.approx(expected, rel=1e-5), path
            seen.add(path.relative_to(out).parts[0][:2])
        assert not [p for p in json.loads((path.parent / "manifest.json").read_text())["outputs"]
                    if "tfevents" in p]
    assert seen == set(experiments.TRAINED)


def test_every_model_has_a_card_whose_code_runs(real):
    """The hub's reader takes its head; the code gives the reward of stage 03, and an answer."""
    import transformers
    from huggingface_hub import ModelCard
    out, cards = real[0], {}
    for path in sorted(out.rglob("model.safetensors")):
        card = ModelCard((path.parent / "README.md").read_text(encoding="utf-8"))
        stage = str(path.parent.relative_to(out))
        policy = stage[:2] in ("01", "06")
        assert f"# {stage}\n" in card.text and card.data.license == "mit"
        assert card.data.pipeline_tag == ("text-generation" if policy else "text-classification")
        assert ("hh_harmless_sample" in card.text) == REAL.exists() and str(REAL) not in card.text
        cards[stage] = re.search(r"```python\n(.*?)```", card.text, re.S)[1]
    assert len(cards) == 1 + 10 + 5 + 4 + 3
    path, values = out / "02_rm_ensemble/rm_03", {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    sizes = json.loads((out / "run.json").read_text())
    row = next(r for r in map(json.loads, (out / "03_strength/train.jsonl").open()) if len(
        tokenizer(r["prompt"])["input_ids"]) < sizes["max_prompt_tokens"] and len(
        tokenizer(r["chosen"])["input_ids"]) < sizes["max_response_tokens"] - 1)  # not cut
    exec(re.sub("text = .*", "text = row['prompt'] + row['chosen']",
                cards["02_rm_ensemble/rm_03"]), values := {"row": row, "path": path})
    assert values["reward"].item() == pytest.approx(row["chosen_score_list"][3], abs=1e-3)
    values["path"] = out / "06_ppo/round_1"
    exec(cards["06_ppo/round_1"], values)
    assert isinstance(values["answer"], str) and "Human: Hi" in values["answer"]


def test_no_row_is_in_the_page(real):
    """Dialogues of data of one's own are shown only with --texts."""
    page = "".join(p.read_text()
                   for p in (real[0] / "09_report").rglob("*")
                   if p.suffix in (".html", ".json"))
    if REAL.exists():
        prompts = [
            json.loads(line)["prompt"]
            for line in (real[0] / "00_data/train.jsonl").read_text().splitlines()]
        assert prompts and not [
            p for p in prompts
            if html.escape(p.strip()) in page or json.dumps(p.strip())[1:-1] in page]
    assert ("not shown" in page) == REAL.exists()


# ---------------------------------------------------------------- refusals

def test_other_flags_on_an_existing_run_are_refused(real):
    out, flags, _ = real
    one_error(driver(*flags[:2], "--limit", 3, "--out", out, check=False), str(out), "other flags")


@pytest.mark.parametrize("flags, words",
                         [(["--lmit", "4"], ["--lmit", "--help"]), (["--limit"], ["--limit"]),
                          (["--gpus", "0"], ["--gpus"]), (["--gpus="], ["--gpus needs a value"]),
                          (["--limit", "many"], ["--limit", "many"]),
                          (["--preset", "huge"], ["--preset"]),
                          (["--seed", "1", "2"], ["2", "--help"]), (["stray"], ["stray"]),
                          (["--from", "99_nothing", "--dry_run"], ["--from", "99_nothing"]),
                          (["--seeds", "2"], ["--seeds goes with experiments"]),
                          (["experiments", "--seed=7", "--dry_run"], ["--seed"]),
                          (["experiments", "--clean", "--dry_run"], ["--clean"]),])
def test_bad_flags(flags, words, tmp_path):
    one_error(driver(*flags, "--out", tmp_path / "out", check=False) if flags != ["--limit"] else
              driver("--out", tmp_path / "out", *flags, check=False), *words)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_one_line_with_the_install_command(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    environment = os.environ | {
        "VIRTUAL_ENV": str(tmp_path / "venv"), "PATH": f"{tmp_path}/venv/bin:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(["bash", "run_all.sh", "--out", tmp_path / "out"], cwd=ROOT, text=True,
                          env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    one_error(done, "torch", "deepspeed", f"pip install -r {ROOT}/requirements.txt")
