"""Stage 00: formats, drops, splits, errors. Real data is counted a second time, by other code."""
import gzip
import importlib
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
data = importlib.import_module("00_data")
import common  # noqa: E402

from lab import formats, templates  # noqa: E402
REAL = ROOT.parent / "shared" / "data" / "hh_harmless_sample.jsonl.gz"
HI = "\n\nHuman: Hi\n\nAssistant:"


def pair(i, **more):
    prompt = f"\n\nHuman: Question {i}?\n\nAssistant:"
    return {"chosen": f"{prompt} good {i}", "rejected": f"{prompt} bad {i}", **more}


def write(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def rows_of(out, name):
    return [
        json.loads(line)
        for line in (out / "00_data" / f"{name}.jsonl").read_text("utf-8").splitlines()]


def metrics(out):
    return json.loads((out / "00_data" / "manifest.json").read_text())["metrics"]


def run(out, *flags):
    """Stage 00 in this process → the run directory."""
    data.main(["--out", str(out), *map(str, flags)])
    return out


def contents(out):
    return {
        p.name: p.read_bytes()
        for p in (out / "00_data").glob("*.jsonl")
        if p.name != "metrics.jsonl"}


def read(row, kind="pairs", model="tiny", template="auto"):
    return formats.read_row(row, kind, formats.style_of(model, template), "general")


def dropped(row, kind="pairs"):
    with pytest.raises(formats.Drop) as reason:
        read(row, kind)
    return str(reason.value)


def spoken(*turns):
    return [{"role": role, "content": text} for role, text in turns]


# ---------------------------------------------------------------- formats

def test_hh_transcript_splits_at_the_last_mark_and_keeps_paragraphs():
    history = ("\n\nHuman: One.\n\nTwo, Human: three.\n\nAssistant: Four.\n\nFive.\n\n"
               "Human: Six?\n\nAssistant:")
    row = read({"chosen": history + " a\n\n1. b\n\n2. c", "rejected": history + "\n no  \n"})
    assert row == {
        "prompt": history, "chosen": " a\n\n1. b\n\n2. c", "rejected": " no", "task": "general"}


@pytest.mark.parametrize("prompt", ["Hi", " Hi\n", HI, HI + " "])
def test_prompt_columns(prompt):
    for lead in ("", "  "):
        row = read({"prompt": prompt, "chosen": lead + "yes", "rejected": lead + "no"})
        assert (row["prompt"], row["chosen"], row["rejected"]) == (HI, " yes", " no")
    assert read({"prompt": HI, "chosen": HI + " yes", "rejected": HI + " no"})["chosen"] == " yes"


def test_messages_in_hh_roles():
    history = spoken(("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello.\n\nWhat now?"),
                     ("user", "Joke!"))
    text = "Be kind.\n\nHuman: Hi\n\nAssistant: Hello.\n\nWhat now?\n\nHuman: Joke!\n\nAssistant:"
    yes, no = spoken(("assistant", "yes")), spoken(("assistant", "no"))
    whole = {"chosen": history + yes, "rejected": history + no}
    for row in (whole, {"prompt": history,
                        **whole}, {"prompt": history, "chosen": yes, "rejected": no},
                {"prompt": history, "chosen": "yes", "rejected": "no"}):
        assert read(row) == {"prompt": text, "chosen": " yes", "rejected": " no", "task": "general"}
    assert read({"prompt": "Hi", "chosen": yes, "rejected": no})["prompt"] == HI
    assert read({"prompt": "Hi", "chosen": spoken(("user", "Hi")) + yes,
                 "rejected": spoken(("user", "Hi")) + no})["prompt"] == HI


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A tokenizer with BOS and a chat template that writes BOS itself, as Llama's do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    path = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A",
                                                             special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>")
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")
    fast.save_pretrained(path)
    return str(path)


def test_messages_through_the_chat_template(chat_model):
    history = spoken(("system", "Be kind."), ("user", "Hi"))
    row = read(
        {
            "prompt": history, "chosen": spoken(("assistant", "yes")), "rejected": spoken(
                ("assistant", " no"))}, model=chat_model)
    assert (row["prompt"], row["chosen"],
            row["rejected"]) == ("<s><system>Be kind.<user>Hi<assistant>", "yes", " no")
    style = formats.style_of(chat_model, "auto")
    for prompt in ("<|im_start|>user\nHi<|im_end|>\n", "<s><user>Hi<assistant>"):
        style.notes.clear()
        read({"prompt": prompt, "chosen": "yes", "rejected": "no"}, model=chat_model)
        assert sum(style.notes.values()) == 1  # another markup, or the model's twice
    # plain strings too, but with --template hh
    assert read(pair(1), model=chat_model)["prompt"] == "<s><user>Question 1?<assistant>"
    assert read(pair(1), model=chat_model, template="hh") == read(pair(1))


@pytest.mark.skipif(not find_spec("trl"), reason="TRL's templates are not installed")
def test_chat_templates_of_real_models(chat_model, monkeypatch, capsys):
    """Of each that TRL ships, prompt + response + end is what it writes for the whole dialogue, and
    the prompt what it opens a generation with; but for models of images, which take no text."""
    tokenizer, refused = common.load_tokenizer(chat_model), []
    monkeypatch.setattr(common, "load_tokenizer", lambda model: tokenizer)
    talk = spoken(("user", "Hi"), ("assistant", "Hello."), ("user", "Who?"), ("assistant", "I, 2."))
    files = sorted(Path(find_spec("trl").origin).parent.glob("chat_templates/*.jinja"))
    for file in files:
        tokenizer.chat_template = file.read_text(encoding="utf-8")
        try:
            style = templates.style_of(file.stem)
        except SystemExit:
            refused.append(file.stem)
            continue
        prompt, [response] = templates.render(style, talk[:-1], talk[-1:])
        whole = tokenizer.apply_chat_template(talk, tokenize=False)
        assert prompt + response + style.end == whole, file.stem
        opened = tokenizer.apply_chat_template(talk[:-1], tokenize=False,
                                               add_generation_prompt=True)
        assert opened in (prompt, prompt + "<think>\n"), file.stem
        assert response.endswith("I, 2."), file.stem
    assert len(refused) < len(files) / 4 and all(
        name.startswith(("idefics3", "llava_next", "smolvlm")) for name in refused), refused
    assert "cannot be used: it does not write an answer that is a text" in capsys.readouterr().err


def test_a_begun_turn_keeps_its_white_space(chat_model):
    for begun, answer, want in (("Sure:\n", "yes", "\nyes"), ("Sure:", "yes", " yes"),
                                ("Sure:", "\n- yes", "\n- yes")):
        row = read({"prompt": spoken(("user", "Hi"), ("assistant", begun)), "chosen": answer,
                    "rejected": "\nno"}, model=chat_model)
        assert (row["prompt"], row["chosen"]) == ("<s><user>Hi<assistant>Sure:", want)


def test_code_keeps_its_indentation(chat_model):
    row = read({"prompt": "def f(x):", "chosen": "\n    return x\n", "rejected": " no"},
               model=chat_model)
    assert (row["chosen"], row["rejected"]) == ("    return x", "no")


def test_one_bos_where_the_text_has_its_own(chat_model):
    import common
    tokenizer, run = common.load_tokenizer(chat_model), {
        "form": "hh", "end": "", "max_prompt_tokens": 8, "max_response_tokens": 8}
    rows = [{"id": i, "prompt": p, "response": " x"} for i, p in enumerate(("<s> Hi", "Hi"))]
    (own,), (added,) = ([g["prompt"]] for g in common.encode(tokenizer, rows, ["response"], run))
    assert own == added == [0, 2]
    group, = common.encode(tokenizer, [{"id": 0, "prompt": "Hi", "response": " x</s>"}],
                           ["response"], run)
    assert group["responses"] == [[2, 1]]  # one EOS, the text's own


@pytest.mark.parametrize("spelling", ["chosen score list", "chosen_score_list"])
def test_released_strength_set(spelling):
    history = ["Hi", "Hello.\n\nWhat?", "Joke!"]
    row = read({
        "chosen": history + ["yes"], "rejected": history + ["no"], spelling: [1.0, 2.0],
        spelling.replace("chosen", "rejected"): [0.5, 0.5], "mean preference difference": 1.0,
        "std preference difference": 0.5, "GPT4 label": 1})
    assert row == {
        "prompt": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nWhat?\n\nHuman: Joke!\n\nAssistant:",
        "chosen": " yes", "rejected": " no", "chosen_score_list": [1.0, 2.0],
        "rejected_score_list": [0.5, 0.5], "mean preference difference": 1.0,
        "std preference difference": 0.5, "margin": 1.0, "judge_label": 1, "task": "general"}


def test_known_columns_are_carried():
    row = read(
        pair(1, judge_label=0, gold_chosen=1.5, gold_rejected=2, margin=-0.1, task="Some Task/x",
             other=[1]))
    assert (row["judge_label"], row["gold_chosen"], row["gold_rejected"],
            row["margin"]) == (0, 1.5, 2, -0.1)
    assert row["task"] == "some_task_x" and "other" not in row


def test_sft_and_prompt_rows():
    want = {"prompt": HI, "response": " yes"}
    sharegpt = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "yes"}]
    talk = spoken(("user", "Hi"), ("assistant", "yes"))
    for row in ({"prompt": "Hi",
                 "response": "yes"}, {"messages": talk}, {"conversations": sharegpt}):
        assert read(row, "sft") == want
    for row in ("Hi", HI, {"prompt": "Hi"}, {"prompt": talk[:1]}, {"messages": talk},
                {"messages": talk[:1]}, {"conversations": sharegpt
                                         }, {"chosen": HI + " yes", "rejected": "?"}):
        assert read(row, "prompts") == {"prompt": HI, "task": "general"}


# ---------------------------------------------------------------- drops and bad rows

def test_drop_reasons():
    assert dropped({"chosen": "Hi", "rejected": HI + " no"}) == "column `prompt` is missing"
    assert dropped({"chosen": HI + " yes\n\nHuman: Bye",
                    "rejected": HI + " no"}) == "no assistant turn"
    assert dropped({"chosen": [], "rejected": []}) == "no assistant turn"
    assert dropped({"chosen": spoken(("user", "Hi")), "rejected": spoken(
        ("user", "Hi"))}) == "no assistant turn"
    assert dropped({"messages": spoken(("user", "Hi"))}, "sft") == "no assistant turn"
    assert dropped({"chosen": HI + " yes",
                    "rejected": "\n\nHuman: Ho\n\nAssistant: no"}) == "prompts differ"
    assert dropped({"chosen": HI + " \n", "rejected": HI + " no"}) == "empty response"
    assert dropped({"prompt": " ", "chosen": "yes", "rejected": "no"}) == "empty prompt"
    assert dropped({
        "chosen": "\n\nHuman:\n\nAssistant: a",
        "rejected": "\n\nHuman:\n\nAssistant: b"}) == "empty prompt"
    assert dropped({"chosen": ["yes"], "rejected": ["no"]}) == "empty prompt"
    assert dropped({"chosen": HI + " yes", "rejected": HI + "  yes "}) == "identical responses"


BAD = [
    '{"prompt": "Q", "chosen": "A", "chosen": "B", "rejected": "C"}',
    "{not json", "[1, 2]", "null", "7", "[" * 100_000, '"text"', {"chosen": "x"},
    {"rejected": HI + " a"}, {"chosen": 1,
                              "rejected": HI + " b"}, {"chosen": [1, 2], "rejected": [1, 3]},
    {"prompt": 5, "chosen": "a",
     "rejected": "b"}, {"chosen": HI + " \ud800", "rejected": HI + " b"},
    {"chosen": [{"role": "narrator", "content": "x"}], "rejected": [{"role": "user"}]},
    {"chosen": [{"role": "user"}], "rejected": [{"role": "user", "content": "x"}]},
    pair(1, margin=float("nan")),
    pair(1, chosen_score_list=[1.0]),
    pair(1, chosen_score_list=[True], rejected_score_list=[1]),
    pair(1, chosen_score_list=[float("inf")], rejected_score_list=[1]),
    pair(1, judge_label=2),
    pair(1, task=3),
    pair(1, gold_chosen="1.0 or 2"),
    pair(1, gold_chosen=10**400),
    pair(1, **{"GPT4 label": "yes"}),]


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_a_bad_row_stops_the_run_with_one_line(bad, tmp_path, capsys):
    source = write(tmp_path / "x.jsonl", [pair(1), pair(2), bad, pair(3)])
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "out", "--preferences", source)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and f"{source}:3: " in message and "good" not in message
    assert not (tmp_path / "out" / "00_data").exists() and not (tmp_path / "out" /
                                                                "run.json").exists()
    out = run(tmp_path / "out", "--preferences", source, "--skip_bad_rows")
    assert metrics(out)["drops"] == {"unreadable": 1} and metrics(out)["kept"] == 3


def test_counts_add_up_and_are_reported(tmp_path, capsys):
    rows = [pair(i) for i in range(20)] + [
        pair(3), {"chosen": "x", "rejected": "y"}, "",
        pair(4, margin="a")]
    out = run(tmp_path / "out", "--preferences", write(tmp_path / "x.jsonl", rows),
              "--skip_bad_rows")
    want = {"column `prompt` is missing": 1, "duplicate pair": 1, "unreadable": 1}
    m = metrics(out)
    assert (m["read"], m["kept"],
            m["drops"]) == (23, 20, want) and m["read"] == m["kept"] + sum(want.values())
    line = json.loads((out / "00_data" / "metrics.jsonl").read_text().splitlines()[0])
    assert (line["read"], line["kept"], line["drops"]) == (23, 20, want)
    assert "'duplicate pair': 1" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["nowhere.jsonl", "a b", "no_slash", "toy:poems", "./", "x.txt",
                                    "*.csv", "x.jsonl/"])
def test_unknown_sources(source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text("Hi")
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "out", "--preferences", source)
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["cut.jsonl.gz", "text.jsonl.gz", "text.parquet"])
def test_broken_files(name, tmp_path, capsys):
    whole = gzip.compress("".join(json.dumps(pair(i)) + "\n" for i in range(500)).encode())
    (tmp_path / name).write_bytes(whole[:-100] if name.startswith("cut") else b"{}")
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "out", "--preferences", tmp_path / name, "--skip_bad_rows")
    assert stop.value.code == 2 and f"{name} cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out" / "00_data").exists()


def test_command_line_hub_without_network_and_other_ranks(tmp_path):
    def start(*flags, **env):
        return subprocess.run(
            [sys.executable, ROOT / "00_data.py", "--out", tmp_path / "out", *flags], cwd=tmp_path,
            capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"} | env)

    cache = str(tmp_path / "cache")
    for flags, says in (([], "cannot load --model meta-llama/Llama-2-7b-hf"),
                        (["--model", "tiny"], "Anthropic/hh-rlhf:harmless-base cannot be read")):
        done = start("--preset", "paper", *flags, HF_HOME=cache)
        assert done.returncode == 2 and done.stderr.strip().count("\n") <= 1
        assert f"error: {says}" in done.stderr
    assert not (tmp_path / "out" / "00_data").exists()
    done = start(RANK="1", WORLD_SIZE="2")
    assert done.returncode == 0 and not (tmp_path / "out" / "00_data").exists()
    done = start("--preferences", write(tmp_path / "x.jsonl", [pair(1), "{"]))
    assert done.returncode == 2 and done.stderr.strip().endswith(
        "goes on)") and "x.jsonl:2: not JSON" in done.stderr
    done = start("--preset", "paper", "--dry_run")
    assert json.loads(done.stdout)["max_response_tokens"] == 512


def test_hub_rows_of_all_splits(tmp_path, monkeypatch):
    import datasets
    asked = []

    def load_dataset(name, data_dir=None):
        asked.append((name, data_dir))
        k = len(asked) * 100
        return {"train": [pair(k + i) for i in range(9)], "test": [pair(k + 50)]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    out = run(tmp_path / "out", "--preferences", "Anthropic/hh-rlhf", "me/other:part")
    folders = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
    assert asked == [("Anthropic/hh-rlhf", f) for f in folders] + [("me/other", "part")]
    rows = {r["id"]: r for r in rows_of(out, "train") + rows_of(out, "valid")}
    assert metrics(out)["kept"] == len(rows) == 50
    assert rows["hh-rlhf-helpful-base-train-3"]["task"] == "helpful"
    assert rows["hh-rlhf-harmless-base-test-1"]["task"] == "harmless" and rows["other-part-test-1"][
        "task"] == "general"


def test_what_follows_a_hub_id_is_a_configuration_or_a_folder(tmp_path, monkeypatch):
    """datasets takes a folder of that name for the hub's."""
    folder = tmp_path / "me/two"
    for k, part in enumerate(("axis", "comparisons")):
        (folder / part).mkdir(parents=True)
        write(folder / part / "train.jsonl", [pair(100 * k + i) for i in range(9 + k)])
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files: {part}/*.jsonl\n"
        for name, part in (("first", "axis"), ("second", "comparisons"))) + "---\n")
    monkeypatch.chdir(tmp_path)
    for part, n in (("first", 9), ("second", 10)):
        assert metrics(run(tmp_path / part, "--preferences", f"me/two:{part}"))["kept"] == n


# ---------------------------------------------------------------- splits, ids, run.json

def test_jsonl_gz_and_parquet_are_equal(tmp_path):
    import pyarrow
    import pyarrow.parquet
    # the last has nulls in parquet
    rows = [pair(i, judge_label=i % 2, margin=i / 7) for i in range(30)] + [pair(31)]
    write(tmp_path / "x.jsonl", rows)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress((tmp_path / "x.jsonl").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    first, *others = (contents(run(tmp_path / s, "--preferences", tmp_path / f"x.{s}"))
                      for s in ("jsonl", "jsonl.gz", "parquet"))
    assert len(first) == 5 and all(first == other for other in others)


def test_split_by_prompt(tmp_path):
    rows = [
        dict(pair(i), chosen=pair(i)["chosen"] + f" {j}")
        for i in range(60)
        for j in range(1 + i % 4)]
    source = write(tmp_path / "x.jsonl", rows)
    out = run(tmp_path / "a", "--preferences", source)
    train, valid = rows_of(out, "train"), rows_of(out, "valid")
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in valid}
    assert len(train) + len(valid) == 150 and 15 <= len(valid) < 15 + 4
    prompts = rows_of(out, "prompts")
    assert sorted(r["prompt"] for r in prompts) == sorted({r["prompt"] for r in train})
    assert [r["response"] for r in rows_of(out, "sft")] == [r["chosen"] for r in train]
    assert {r["prompt"] for r in rows_of(out, "eval_general")} == {r["prompt"] for r in valid}
    assert contents(run(tmp_path / "b", "--preferences", source)) == contents(out)
    # and runs again
    assert contents(run(tmp_path / "b", "--preferences", source, "--seed", 1)) != contents(out)
    saved = json.loads((tmp_path / "b" / "run.json").read_text())
    assert saved == {
        "preset": "toy", "model": "tiny", "seed": 1, "limit": None, "preferences": [source],
        "sft": None, "prompts": None, "ood_prompts": None, "max_prompt_tokens": 80,
        "max_response_tokens": 48, "template": "auto", "world": None, "tasks": ["general"],
        "form": "hh", "end": "", "lead": " ", "day": None}


def test_judged_prompts_are_validated_first_and_two_prompts_suffice(tmp_path):
    rows = [pair(i, **{"GPT4 label": 1 if i in (3, 50) else -1}) for i in range(100)]
    out = run(tmp_path / "a", "--preferences", write(tmp_path / "x.jsonl", rows))
    valid = rows_of(out, "valid")
    assert len(valid) == 10 and {3, 50} <= {int(re.search(r"\d+", r["prompt"])[0]) for r in valid}
    out = run(tmp_path / "b", "--preferences", write(tmp_path / "y.jsonl", [pair(1), pair(2)]))
    assert len(rows_of(out, "train")) == len(rows_of(out, "valid")) == 1
    with pytest.raises(SystemExit):
        run(tmp_path / "c", "--preferences", write(tmp_path / "z.jsonl", [pair(1)]))


def test_limit_cuts_a_random_subset(tmp_path, capsys):
    source = write(tmp_path / "x.jsonl", [pair(i) for i in range(900)])
    out = run(tmp_path / "out", "--preferences", source, "--limit", 1)
    assert {n: len(rows_of(out, n)) for n in metrics(out)["rows"]} == dict.fromkeys(
        ("train", "sft", "prompts"), 64) | dict.fromkeys(("valid", "eval_general"), 16)
    assert metrics(out)["cut_by_limit"][
        "train"] == 810 - 64 and "746 cut by --limit" in capsys.readouterr().out
    ids = [int(r["id"].removeprefix("x-")) for r in rows_of(out, "train")]
    assert max(ids) > 500 and ids == sorted(ids)


def test_many_tasks_are_evaluated_as_one(tmp_path, capsys):
    rows = [pair(i, id=i, task=f"task {i % 40}") for i in range(200)]
    out = run(tmp_path / "out", "--preferences", write(tmp_path / "x.jsonl", rows),
              "--valid_fraction", 0.5)
    assert [p.name for p in (out / "00_data").glob("eval_*")] == ["eval_general.jsonl"]
    assert " tasks are more than 30: evaluated as one" in capsys.readouterr().out
    ids = {r["id"] for name in ("train", "valid") for r in rows_of(out, name)}
    assert ids == set(map(str, range(200)))  # of the rows, numbers too


def test_several_sources_tasks_and_ids(tmp_path):
    helpful = write(tmp_path / "my_helpful.jsonl", [pair(i, id="same") for i in range(30)])
    harmless = write(tmp_path / "my_harmless.jsonl", [pair(100 + i) for i in range(30)])
    sft = write(tmp_path / "s.jsonl", [{"prompt": f"S{i}", "response": "ok"} for i in range(5)])
    prompts = write(tmp_path / "p.jsonl", ['"P1"', '"P2"', '"P1"', {"prompt": "P3", "task": "odd"}])
    ood = write(tmp_path / "tldr.jsonl", ['"O1"', '"O2"'])
    out = run(tmp_path / "out", "--preferences", helpful, harmless, "--sft", sft, "--prompts",
              prompts, "--ood_prompts", ood, "--n_eval", 2, "--valid_fraction", 0.5)
    rows = rows_of(out, "train") + rows_of(out, "valid")
    ids = [r["id"] for r in rows]
    assert len(set(ids)) == 60 and {"same", "same-2", "same-30", "my_harmless-30"} <= set(ids)
    assert {r["task"] for r in rows} == {"helpful", "harmless"}
    assert json.loads((out / "run.json").read_text())["tasks"] == ["helpful", "harmless"]
    assert len(rows_of(out, "eval_helpful")) == len(rows_of(out, "eval_harmless")) == 2
    assert [r["prompt"] for r in rows_of(out, "ood_summary")
            ] == [f"\n\nHuman: O{i}\n\nAssistant:" for i in (1, 2)]
    assert [r["task"] for r in rows_of(out, "prompts")] == ["general", "general", "odd"]
    assert len(rows_of(out, "sft")) == 5
    assert metrics(out)["other_sources"]["prompts"] == {
        "read": 4, "kept": 3, "drops": {"duplicate prompt": 1}}
    inputs = json.loads((out / "00_data/manifest.json").read_text())["inputs"]
    assert set(inputs) == {helpful, harmless, sft, prompts, ood}


def test_evaluation_prompts_are_kept_out_of_training(tmp_path):
    pairs = write(tmp_path / "x.jsonl", [pair(i) for i in range(40)])
    out = run(tmp_path / "out", "--preferences", pairs, "--prompts", pairs, "--sft", pairs,
              "--n_eval", 2)
    for kind, n, held in (("prompts", 2, "eval_general"), ("sft", 4, "valid")):
        assert metrics(out)["other_sources"][kind].items() >= {
            "read": 40, "kept": 40 - n, "drops": {"held-out prompt": n}}.items()
        assert not {r["prompt"] for r in rows_of(out, kind)} & {
            r["prompt"] for r in rows_of(out, held)}


def test_toy_world(tmp_path):
    small = ("--n_pairs", 80, "--n_sft", 20, "--n_prompts", 20, "--n_eval", 5, "--n_gold", 12)
    out = run(tmp_path / "a", *small)
    assert len(rows_of(out, "gold")) == 12
    assert all(r["gold_chosen"] > r["gold_rejected"] for r in rows_of(out, "gold"))
    saved, valid = json.loads((out / "run.json").read_text()), rows_of(out, "valid")
    assert (saved["world"], saved["tasks"], saved["model"]) == ("toy", ["helpful",
                                                                        "harmless"], "tiny")
    for r in valid:
        c, rejected = r["gold_chosen"], r["gold_rejected"]
        assert r["judge_label"] == (-1 if c == rejected else int(c > rejected))
        assert (r["judge_label"] == -1) == (r["gold_chosen"] == r["gold_rejected"])
    assert all("judge_label" not in r and "gold_chosen" in r for r in rows_of(out, "train"))
    assert all(
        len(rows_of(out, f"{kind}_{task}")) == 5
        for kind in ("eval", "ood")
        for task in saved["tasks"])
    assert contents(run(tmp_path / "b", *small)) == contents(out) != contents(
        run(tmp_path / "c", *small, "--seed", 1))
    out = run(tmp_path / "d", *small[2:], "--preset", "paper", "--model", "tiny",
              "--preferences", "toy:summary")
    toy_size = data.HPARAMS["n_pairs"][2]  # the paper's column has none
    assert metrics(out)["read"] == toy_size and json.loads(
        (out / "run.json").read_text())["tasks"] == ["summary"]
    assert json.loads(
        (out / "00_data" / "manifest.json").read_text())["hyperparameters"]["n_pairs"] == toy_size


# ---------------------------------------------------------------- any row at all, and the real
# sample

def test_a_million_characters_and_control_characters_are_kept():
    """They are cut when they are encoded, in no time that anyone would notice."""
    long, strange = "a" * 10 ** 6, "yes\x00\x07\x1b[2J\r\u202e"
    assert read({"prompt": "Hi", "chosen": long, "rejected": strange})["chosen"] == " " + long
    assert read({"prompt": "Hi", "chosen": long, "rejected": strange})["rejected"] == " " + strange


text = st.text(max_size=5) | st.sampled_from(
    ["", " ", "Hi", "yes", HI, HI + " yes", HI + " no", "\ud800", "\n\nHuman:", "Assistant: a",
     "a</s>", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "[INST] Hi [/INST] yes",
     "[{'role': 'user', 'content': 'Hi'}]", '[["Hi", "yes"]]'])
anything = st.none() | st.booleans() | st.integers() | st.floats() | text
message = st.dictionaries(
    st.sampled_from(["role", "content", "from", "value"]),
    st.sampled_from(["user", "assistant", "system", "gpt", "human"]) | anything)
turn_list = st.lists(text, max_size=4) | st.lists(message, max_size=4) | st.lists(
    anything, max_size=3)
cell = text | turn_list | anything | st.lists(st.floats() | st.integers(), max_size=3)
columns = st.sampled_from([
    "prompt", "chosen", "rejected", "messages", "conversations", "response", "id", "task", "margin",
    "judge_label", "GPT4 label", "chosen score list", "rejected_score_list",
    "mean preference difference", "gold_chosen", "system", "history", "question", "input",
    "response_0", "response_1", "choice", "completions", "tools"])


# found once: a response that holds a dialogue
@example(row={"chosen": ["0", "", "", "0"], "rejected": ["0", "", "", HI]}, kind="pairs")
@settings(max_examples=1000, deadline=None, derandomize=True)
@given(
    row=st.dictionaries(columns, cell) | st.fixed_dictionaries({"chosen": cell, "rejected": cell})
    | cell, kind=st.sampled_from(["pairs", "sft", "prompts"]))
def test_any_row_is_kept_dropped_or_reported(row, kind):
    before = repr(row)
    try:
        clean = read(row, kind)
    except formats.Drop as reason:
        assert str(reason) in ("no assistant turn", "prompts differ", "empty prompt",
                               "empty response", "identical responses", "no preference",
                               "column `prompt` is missing")
    except formats.Bad as problem:
        assert str(problem) and "\n" not in str(problem)
    else:
        again = json.loads(json.dumps(clean, ensure_ascii=False, allow_nan=False).encode())
        assert again == clean and ("\n\nAssistant:" in clean["prompt"]  # or its turn is begun
                                   or formats.markup(clean["prompt"]))
        texts = {"pairs": ("chosen", "rejected"), "sft": ("response",), "prompts": ()}[kind]
        lead = "" if formats.markup(clean["prompt"]) else " "
        assert all(clean[k] == lead + clean[k].strip() != lead for k in texts)
        if kind == "pairs":
            # reading its own output is no change
            assert clean["chosen"] != clean["rejected"] and read(clean) == clean
    assert repr(row) == before


@pytest.mark.skipif(not REAL.exists(), reason="the real sample lies outside the project")
def test_drop_counts_on_real_rows_equal_a_second_count(tmp_path):
    out = run(tmp_path / "out", "--preferences", REAL)
    want, seen, kept = {}, set(), 0
    pattern = re.compile(r"(.*)\n\nAssistant:(.*)", re.DOTALL)  # greedy: the last mark
    for line in gzip.open(REAL, "rt", encoding="utf-8"):
        (p, c), (q, r) = (pattern.fullmatch(json.loads(line)[k]).groups()
                          for k in ("chosen", "rejected"))
        empty = not (c.split() and r.split())
        reason = "prompts differ" if p != q else "empty response" if empty else \
            "identical responses" if c.strip() == r.strip() else \
            "duplicate pair" if (p, c.strip(), r.strip()) in seen else None
        seen.add((p, c.strip(), r.strip()))
        kept += reason is None
        want[reason] = want.get(reason, 0) + 1
    del want[None]
    assert metrics(out)["drops"] == want and metrics(out)["kept"] == kept and metrics(
        out)["read"] == 1800
    assert json.loads((out / "run.json").read_text())["tasks"] == ["harmless"]
    train, valid = rows_of(out, "train"), rows_of(out, "valid")
    assert len(train) + len(valid) == kept and not {r["prompt"]
                                                    for r in train} & {r["prompt"] for r in valid}
    # answers of several paragraphs survive
    assert any(r["chosen"].count("\n\n") > 1 for r in train)
