"""`run_all.sh clean`: the verdicts, the layout, the page, what TRL makes of it; and --folds."""
import json
import shutil

import pytest
from conftest import ROOT, python_stages, run

from lab import formats

MEAN = "mean preference difference"


def rows_of(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def test_rows_that_bring_their_scores_need_no_voters(tmp_path):
    """Nor an SFT model, to be cleaned; the whole pipeline's 08 asks the ensemble."""
    rows = [{"prompt": f"Why {i}?", "chosen": f"Because {i}.", "rejected": "No.",
             "chosen score list": [0.1 * i, 1.0], "rejected score list": [1.0, 1.5]}
            for i in range(40)]
    plain = [{**rows[0], "chosen score list": []}, *({k: row[k] for k in (
        "prompt", "chosen", "rejected")} for row in rows[1:])]
    for name, some in (("x", rows), ("mixed", rows[:30] + plain[30:]), ("plain", plain)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    flags = ["--preferences", tmp_path / "x.jsonl", "--out", tmp_path / "out"]

    def plan(*more):
        return run("python", ROOT / "lab/experiments.py", "--plan", *more, check=False).stdout
    assert "02_rm_ensemble" in plan(*flags)
    run("bash", ROOT / "run_all.sh", "clean", *flags)
    other = ["--clean", "--out", tmp_path / "out", "--from", "00", "--preferences"]
    for name in ("mixed", "plain"):
        assert "02_rm_ensemble" in plan(*other, tmp_path / f"{name}.jsonl")
    assert "02_rm_ensemble" not in plan(*other, tmp_path / "x.jsonl")
    assert "--to 02 is no stage of this run" in plan("--clean", *flags, "--to", "02")
    made = {p.parent.name for p in (tmp_path / "out").glob("*/manifest.json")}
    assert made == {"00_data", "03_strength", "clean"}
    assert sum(r["verdict"] == "flip" for r in rows_of(tmp_path / "out/clean/train.jsonl")) > 3
    again = run("bash", ROOT / "run_all.sh", "clean", *flags).stdout
    assert again.count("is complete, skipped") == 3


@pytest.fixture(scope="module")
def cleaned(small_run, tmp_path_factory):
    """A small run, voted on again by two models that leave a fold out each, and cleaned."""
    out = shutil.copytree(small_run, tmp_path_factory.mktemp("clean") / "out")
    shutil.rmtree(out / "04_rm_denoise"), shutil.rmtree(out / "06_ppo")
    flags = ["--out", out]
    python_stages(["02_rm_ensemble", *flags, "--M", 2, "--folds", 2, "--limit", 5],
                  ["03_strength", *flags, "--M", 2], ["lab.clean", *flags])
    return out


def test_every_pair_has_a_verdict_by_the_papers_rule(cleaned):
    splits = {s: rows_of(cleaned / f"03_strength/{s}.jsonl") for s in ("train", "valid")}
    rows = {r["id"]: r for r in rows_of(cleaned / "clean/train.jsonl")}
    pairs = {r["id"]: r for r in splits["train"] + splits["valid"]}
    assert rows.keys() == pairs.keys() and len(rows) == len(splits["train"]) + len(splits["valid"])
    weakest = sorted(splits["train"], key=lambda r: r[MEAN])[:round(0.2 * len(splits["train"]))]
    flips = {r["id"] for r in weakest if r[MEAN] < 0}
    assert flips and flips == {r["id"] for r in rows.values()
                               if r["verdict"] == "flip" and r["split"] == "train"}
    for i, row in rows.items():
        flip, mu_hat = row["verdict"] == "flip", pairs[i][MEAN]
        assert row["verdict"] in ("flip", "soften") if mu_hat < 0 else row["verdict"] == "keep"
        assert row["margin"] == (-mu_hat if flip else mu_hat)
        assert row["prompt"] == pairs[i]["prompt"]
        sides = [row[k].strip() for k in ("chosen", "rejected")]
        want = [pairs[i][k].strip() for k in ("chosen", "rejected")]
        assert sides == (want[::-1] if flip else want)
    assert " stages hold" in run("bash", "run_all.sh", "verify", "--out", cleaned).stdout
    assert "stale" not in run("bash", "run_all.sh", "status", "--out", cleaned).stdout
    line = (cleaned / "clean/summary.txt").read_text()
    assert line.count("\n") == 1 and f"{sum(r['verdict'] == 'flip' for r in rows.values())} flip" \
        in line


def test_the_page_shows_texts_only_when_asked(cleaned):
    again = run("python", ROOT / "lab/experiments.py", "--plan", "--clean", "--texts", "--M", 2,
                "--folds", 2, "--out", cleaned).stdout.splitlines()
    assert again[-1].split("\t")[:2] == ["run", "clean"]
    page = (cleaned / "clean/doubtful.html").read_text(encoding="utf-8")
    row = min(rows_of(cleaned / "03_strength/train.jsonl"), key=lambda r: r[MEAN])
    assert row["id"] in page and row["chosen"].strip() not in page
    assert (cleaned / "clean/strength.png").stat().st_size > 5000
    run("python", ROOT / "lab/clean.py", "--out", cleaned, "--texts")
    assert row["chosen"].strip() in (cleaned / "clean/doubtful.html").read_text(encoding="utf-8")


def test_with_folds_no_model_scores_what_it_was_trained_on(cleaned):
    held_out = [set(json.loads((cleaned / f"02_rm_ensemble/rm_0{m}/held_out.json").read_text()))
                for m in range(2)]
    train = {r["id"]: r for r in rows_of(cleaned / "03_strength/train.jsonl")}
    assert held_out[0] | held_out[1] == train.keys() and not held_out[0] & held_out[1]
    by_prompt = {}
    for i, row in train.items():
        by_prompt.setdefault(row["prompt"], set()).add(i in held_out[0])
    assert all(len(x) == 1 for x in by_prompt.values())
    assert {len(r["chosen_score_list"]) for r in train.values()} == {1}
    assert {len(r["chosen_score_list"]) for r in rows_of(
        cleaned / "03_strength/valid.jsonl")} == {2}
    steps = json.loads((cleaned / "02_rm_ensemble/rm_00/manifest.json").read_text())
    assert steps["hyperparameters"]["folds"] == 2
    import common
    from types import SimpleNamespace
    args = SimpleNamespace(precision="fp32", layout="auto", eval_batch_size=64, zero=0,
                           run=json.loads((cleaned / "run.json").read_text()))
    for m in range(2):  # the score is that of the model that left the pair out
        rows = [r for r in train.values() if r["id"] in held_out[m]]
        member = cleaned / f"02_rm_ensemble/rm_0{m}"
        tokenizer = common.load_tokenizer(member)
        groups = common.encode(tokenizer, rows, ("chosen", "rejected"), args.run)
        scores = common.score_by(member, groups, args, tokenizer)
        assert [r["chosen_score_list"][0] for r in rows] == pytest.approx(
            scores[:, 0].tolist(), abs=2e-4)


def test_the_rule_is_that_of_stage_04_with_ties_too():
    from importlib import import_module

    from lab import clean
    rows = [{"id": i, "chosen": "a", "rejected": "b", MEAN: float(m)} for i, m in enumerate(
        [-1] * 20 + [0, 1, 2, -0.5] * 3)]
    stage = import_module("04_rm_denoise")
    made = stage.relabel(rows, **stage.METHODS["flip"])
    found = clean.verdicts(rows, [{"id": "v", MEAN: -1.0}])
    assert {i for i, v in found.items() if v == "flip"} - {"v"} == {
        r["id"] for r in made if r["flipped"]} and found["v"] == "flip"


@pytest.mark.parametrize("flags", [[], ["--M", "4"], ["--folds", "2"], ["--M", "4", "--folds", "2"],
                                   ["--texts"]])
def test_the_driver_gives_each_stage_its_own_flags(flags, tmp_path):
    done = run("bash", "run_all.sh", "clean", "--dry_run", *flags, "--out", tmp_path / "out")
    commands = [line for line in done.stdout.splitlines() if line.startswith(("python", "deepsp"))]
    given = " ".join(flags)
    M = "--M 4" if "--M" in given else ""
    folds = "--folds 2" if "--folds" in given else ""
    texts = "--texts" if "--texts" in given else ""
    out = f"--out {tmp_path / 'out'}"
    assert [" ".join(c.split()) for c in commands] == [" ".join(c.split()) for c in (
        f"python 00_data.py {out}", f"deepspeed 01_sft.py {out}",
        f"deepspeed 02_rm_ensemble.py {M} {folds} {out}", f"deepspeed 03_strength.py {M} {out}",
        f"python lab/clean.py {texts} {out}")]


def test_the_pipeline_takes_voters_and_folds_too(tmp_path):
    def plan(*flags):
        return run("python", "lab/experiments.py", *flags, "--out", tmp_path, check=False).stdout
    lines = plan("--plan", "--M", "4", "--folds", "2", "--rounds", "1").splitlines()
    told = {name: command for _, name, _, _, command in (line.split("\t") for line in lines)}
    assert {name: "--M 4" in command for name, command in told.items()} == {
        name: name in ("02_rm_ensemble", "03_strength", "08_evaluate") for name in told}
    assert [name for name, command in told.items() if "--folds 2" in command] == ["02_rm_ensemble"]
    assert len(told) == 11 and "--texts goes with clean" in plan("--plan", "--texts")
    assert "--M and --folds go with the pipeline" in plan("--M", "4")


def test_folds_that_cannot_be_are_refused(cleaned):
    for flags in (["--folds", 1], ["--folds", 3]):
        for script in (["02_rm_ensemble.py"], ["lab/experiments.py", "--plan", "--clean"]):
            done = run("python", *script, "--out", cleaned, "--M", 4, *flags, check=False)
            assert done.returncode == 2 and "--folds must be" in done.stdout
    done = run("python", "03_strength.py", "--out", cleaned, "--M", 1, check=False)
    assert done.returncode == 2 and "--M must be a multiple" in done.stdout


def test_a_run_that_asks_for_no_folds_does_not_use_them(cleaned):
    """Nor one without --texts their page: what is not said is meant too."""
    run("python", ROOT / "lab/clean.py", "--out", cleaned, "--texts")
    for flags, want in ((["--M", 2, "--folds", 2, "--texts"], "skip"), (["--M", 2], "run")):
        lines = [x.split("\t") for x in run(
            "python", ROOT / "lab/experiments.py", "--plan", "--clean", *flags, "--out",
            cleaned).stdout.splitlines()]
        assert {x[1]: x[0] for x in lines if x[0] != "note"}["02_rm_ensemble"] == want
        assert lines[-1][:2] == [want, "clean"]


TALK, YES, NO = [{"role": "user", "content": "Hi"}], {"role": "assistant", "content": "Yes."}, \
    {"role": "assistant", "content": "No."}
HH = "\n\nHuman: Hi\n\nAssistant:"


@pytest.mark.parametrize("row, want", [
    ({"prompt": TALK, "chosen": [YES], "rejected": [NO]}, None),
    ({"chosen": [*TALK, YES], "rejected": [*TALK, NO], "score_chosen": 3},
     {"prompt": TALK, "chosen": [YES], "rejected": [NO]}),
    ({"chosen": HH + " Yes.", "rejected": HH + " No."}, None),
    ({"prompt": HH, "chosen": " Yes.", "rejected": " No."}, None),
    ({"prompt": "", "chosen": HH + " Yes.", "rejected": HH + " No."},
     {"chosen": HH + " Yes.", "rejected": HH + " No."}),
    ({"prompt": "USER: Hi ASSISTANT:", "chosen": "Yes.", "rejected": "No."}, None),
    ({"prompt": "### Human: Hi### Assistant:", "chosen": " Yes.", "rejected": " No."}, None),
    ({"chosen": "### Instruction:\nHi\n\n### Response:\nYes.",
      "rejected": "### Instruction:\nHi\n\n### Response:\nNo."}, None),
    ({"instruction": "Hi", "response_0": "No.", "response_1": "Yes.", "choice": 1},
     {"prompt": "Hi", "chosen": "Yes.", "rejected": "No."})])
def test_pairs_keep_the_layout_that_they_came_in(row, want):
    assert formats.as_came(row, formats.style_of("tiny")) == (want or row)


@pytest.mark.parametrize("spoken", [False, True])
@pytest.mark.parametrize("template", ["auto", "none", "chat"])
def test_what_is_written_is_read_as_what_came(spoken, template, tmp_path):
    """Every odd row that is kept: its prompt, the columns beside it, what was taken off."""
    from test_cases import ROWS
    style, kept = formats.style_of("tiny", "auto" if template == "chat" else template), 0
    if template == "chat":
        from test_models import FAMILIES, make
        make(tmp_path, *FAMILIES["qwen2"])
        style = formats.style_of(str(tmp_path))
    for why, row, _ in ROWS:
        try:
            want = formats.read_row(row, "pairs", style, "general")
        except (formats.Drop, formats.Bad):
            continue
        came = formats.as_came(row, style, spoken)
        got = formats.read_row(came, "pairs", style, "general")
        assert [got[k] for k in ("prompt", "chosen", "rejected")] == [
            want[k] for k in ("prompt", "chosen", "rejected")], why
        assert not (spoken and template != "none" and isinstance(came["prompt"], str)
                    and not formats.markup(came["prompt"]))
        kept += 1
    assert kept > (20 if template == "none" else 80)


def test_rows_of_several_layouts_are_written_as_messages():
    from datasets import Dataset

    from lab import clean
    rows = {"1": {"instruction": "Hi", "chosen": "Yes.", "rejected": "No."},
            "2": {"instruction": "Hi", "system": "Be kind.", "chosen": "Yes.", "rejected": "No."}}
    pairs = clean.layout(rows, [{"id": i} for i in rows], formats.style_of("tiny"))
    assert len(Dataset.from_list(list(pairs.values()))) == 2
    assert [m["role"] for m in pairs["2"]["prompt"]] == ["system", "user"]


def test_trl_trains_on_it(cleaned, tmp_path):
    import datasets
    import transformers
    from trl import RewardConfig, RewardTrainer
    path, seen = cleaned / "02_rm_ensemble/rm_00", []
    rows = datasets.Dataset.from_list(rows_of(cleaned / "clean/train.jsonl"))
    trainer = RewardTrainer(
        model=transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=1),
        args=RewardConfig(output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=8,
                          report_to=[], use_cpu=True, bf16=False, save_strategy="no"),
        train_dataset=rows, processing_class=transformers.AutoTokenizer.from_pretrained(path))
    collate = trainer.data_collator
    trainer.data_collator = lambda x: seen.append(collate(x)) or seen[-1]
    trainer.train()
    margins = {round(r["margin"], 4) for r in rows}
    assert all(round(m, 4) in margins for batch in seen for m in batch["margin"].tolist())
    assert trainer.state.global_step == 2
