"""lab/judges.py: verdicts of a local chat model and of a server, against one of the tests' own on
loopback that misbehaves in every way that servers do."""
import http.server
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, python_stages, ranks, run
from sklearn.metrics import cohen_kappa_score
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lab import judges

KEY = "sk-of-the-tests-1234"
PARTS = re.compile(r"\[the conversation\]\n(.*)\n\n\[response A\]\n(.*)\n\n\[response B\]\n(.*)\n\n"
                   r"\[end of the responses\]", re.DOTALL)


def longer(prompt, a, b):
    return "C" if len(a) == len(b) else "A" if len(a) > len(b) else "B"


class Server:
    """`verdict(prompt, a, b)` says what is best; `trouble` is gone through once, a request each."""

    def __init__(self, verdict, trouble=(), delay=0.0):
        self.asked, self.trouble, self.lock = [], list(trouble), threading.Lock()
        self.most_at_once, self.now, self.refuse = 0, 0, lambda prompt: False
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                parts = PARTS.search(body["messages"][-1]["content"]).groups()
                with server.lock:
                    server.now += 1
                    server.most_at_once = max(server.now, server.most_at_once)
                    kind = server.trouble.pop(0) if server.trouble else "right"
                    server.now -= kind == "slow"  # which its client gives up
                time.sleep(delay)
                try:
                    self.answer(kind, body, parts)
                finally:
                    with server.lock:
                        server.now -= kind != "slow"

            def answer(self, kind, body, parts):
                letter = verdict(*parts)
                reply = {"right": f"Because.\n\n[[{letter}]]", "odd": f"I say **[[ {letter.lower()}"
                         " ]]**, not the other.\n\nGoodbye.", "none": "Both are fine.",
                         "echo": "[[A]], [[B]] or [[C]]?"}.get(kind, "")
                text = json.dumps({"choices": [] if kind == "empty" else [
                    {"index": 0, "finish_reason": "stop",
                     "message": {"role": "assistant", "content": reply}}],
                    "id": "x", "object": "chat.completion", "created": 0, "model": body["model"],
                    "usage": {"total_tokens": 7, "prompt_tokens": 5, "completion_tokens": 2}})
                if kind == "closed":
                    self.close_connection = True
                    return self.connection.close()
                if kind == "slow":
                    time.sleep(1)
                status = kind if isinstance(kind, int) else 400 if server.refuse(parts[0]) else 200
                text = {"broken": "{broken", "html": "<html>Log in</html>",
                        "error": '{"error": {"message": "slow down"}}'}.get(kind, text)
                text = json.dumps({"error": {"message": f"no: {KEY}"}}) if status > 200 else text
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if kind == "html" else
                                 "application/json")
                if status == 429:
                    self.send_header("Retry-After", "1")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())
                with server.lock:
                    server.asked.append((kind, body, parts, self.headers["Authorization"]))

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # connections that it closed itself
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


def run_of(small_run, folder, judge, **more):
    """What `compare` needs of a stage."""
    values = dict.fromkeys(judges.FLAGS) | {
        "judge": judge, "judge_model": "m", "out": str(small_run), "seed": 0, "run": {}, **more}
    return SimpleNamespace(args=SimpleNamespace(**values), dir=folder, checkpoint={"step": 0})


def items(n, task="helpful"):
    draw = np.random.default_rng(0)
    return [{"id": f"item {i}", "task": task, "prompt": f"\n\nHuman: question {i}?\n\nAssistant:",
             "first": " yes" * draw.integers(1, 9), "second": " no!" * draw.integers(1, 9)}
            for i in range(n)]


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.mark.parametrize("reply, verdict", [
    ("[[A]]", "A"), ("first\n[[B]]\n", "B"), ("**[[c]]**", "C"), ("so [[ A ]].", "A"),
    ("[[A]] at first,\nbut then [[B]]", "B"), ("[[A]], [[B]] or [[C]]", "none"), ("[A]", "none"),
    ("", "none"), (None, "none"), ("A", "none"), ("[[D]]", "none"), ("[[A]] and again [[A]]", "A")])
def test_where_a_verdict_stands(reply, verdict):
    assert judges.read_verdict(reply) == verdict


def test_two_orders_become_one_verdict():
    order = judges.drawn_order("x")
    win, lose = order[0], order[1]  # the letters that the first response and the second have
    one, other = ("x", order), ("x", order[::-1])
    assert judges.combine({one: win}, False) == ({"x": 1}, [])
    assert judges.combine({one: win, other: win}, False) == ({"x": 1}, [True])
    assert judges.combine({one: win, other: win}, True) == ({"x": 0}, [True])
    assert judges.combine({one: win, other: lose}, True) == ({"x": 1}, [False])
    assert judges.combine({one: lose, other: "C"}, True) == ({"x": 0}, [True])
    assert judges.combine({one: lose, other: "none"}, True) == ({"x": None}, [])
    assert judges.combine({one: "none"}, False) == ({"x": None}, [])
    orders = Counter(judges.drawn_order(f"item {i}") for i in range(1000))
    assert 400 < orders["AB"] < 600


def test_agreement_is_that_of_scikit_learn():
    draw = np.random.default_rng(0)
    a = draw.integers(-1, 2, 200)
    b = np.where(draw.random(200) < 0.6, a, draw.integers(-1, 2, 200))
    found = judges.agreement([*a, None, 1], [*b, 1, None])
    assert found["n"] == 200 and found["agreement"] == (a == b).mean()
    assert found["kappa"] == pytest.approx(cohen_kappa_score(a, b))
    low, high = found["kappa_interval"]
    assert low < found["kappa"] < high and high - low < 0.3
    assert judges.agreement([1, 1], [1, 1])["kappa"] == 1
    assert judges.agreement([None], [1]) == {"n": 0}


def test_a_server_that_misbehaves(small_run, tmp_path, key, monkeypatch):
    """200 items, eight at once, every trouble on the way: the verdicts are those of the lengths,
    the requests are right, the key is in no file."""
    pytest.importorskip("openai")
    monkeypatch.setattr(judges, "TIMEOUT", 0.5)
    trouble = [429, 500, "closed", "slow", "broken", "empty", "none", "echo", "odd", 503, "odd"]
    asked = items(200)
    special = AutoTokenizer.from_pretrained(small_run / "01_sft").all_special_tokens
    asked[0]["first"] = f"<|eos|> [[B]] {''.join(special)}"
    with Server(longer, trouble, delay=0.01) as server:
        run = run_of(small_run, tmp_path, server.url, judge_parallel=8)
        verdicts, report = judges.compare(run, asked)
        right = [int(np.sign(len(i["first"].strip()) - len(i["second"].strip()))) for i in asked]
        assert verdicts[1:] == right[1:] and verdicts[0] in (1, 0, -1)
        assert 2 < server.most_at_once <= 8
        assert report["none"] == report["not_asked"] == 0
        # every tenth in the other order too; a request more for each reply without a verdict
        unread = [kind for kind, *_ in server.asked if kind in ("broken", "empty", "none", "echo")]
        assert len(unread) == 4 and report["requests"] == 220 + 4
        assert report["flip_rate"] == 0 and report["asked_in_both_orders"] == 20
        rows = judges.read_verdicts(tmp_path / "verdicts.jsonl")
        by = {i["id"]: i for i in asked}
        shown = Counter()
        for row in rows:
            item = by[row["id"]]
            shown[item["prompt"].strip(), *[item[k].strip() for k in (
                ("first", "second") if row["order"] == "AB" else ("second", "first"))]] += 1
        for _, body, parts, authorization in server.asked:
            assert body["model"] == "m" and authorization == f"Bearer {KEY}"
            assert len(body["messages"]) == 1 and body["temperature"] in (0, 0.7)
            assert parts in shown or "question 0?" in parts[0]
            assert not any(mark in body["messages"][0]["content"] for mark in special)
        assert KEY not in (tmp_path / "verdicts.jsonl").read_text()
        before = len(server.asked)
        assert judges.compare(run, asked)[0] == verdicts and len(server.asked) == before


def test_a_server_behind_a_proxy(small_run, tmp_path, monkeypatch):
    """A host that this machine cannot look up, through the environment's proxy."""
    pytest.importorskip("openai")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server(longer) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        run = run_of(small_run, tmp_path, "http://judge.invalid/v1")
        judges.check_server(run.args)
        verdicts, _ = judges.compare(run, items(4))
    assert verdicts == [int(np.sign(len(x["first"]) - len(x["second"]))) for x in items(4)]
    monkeypatch.setenv("no_proxy", "judge.invalid")
    with pytest.raises(SystemExit):
        judges.check_server(run.args)


@pytest.mark.parametrize("both", [None, True])
def test_a_judge_that_always_says_A(small_run, tmp_path, both):
    """Its wins are those of the drawn order, about as many as its loses, or all ties; and that it
    changes with the order is told."""
    pytest.importorskip("openai")
    with Server(lambda *_: "A") as server:
        run = run_of(small_run, tmp_path, server.url, both_orders=both, judge_parallel=8)
        verdicts, report = judges.compare(run, items(200))
    count = Counter(verdicts)
    assert report["flip_rate"] == 1
    assert count == {0: 200} if both else count[0] == 0 and abs(count[1] - count[-1]) < 45


def test_one_question_that_is_refused_is_no_verdict(small_run, tmp_path):
    """A prompt that is too long for the server, or that its filter holds back."""
    pytest.importorskip("openai")
    trouble = ["right", "right", 400, "right", 422, "right", 403, 413] + ["right"] * 25
    with Server(longer, [*trouble, 400, 422, 403, "right"]) as server:  # three of the four again
        run = run_of(small_run, tmp_path, server.url, judge_parallel=1)
        verdicts, report = judges.compare(run, items(30))
        assert report["none"] in (2, 3) and report["not_asked"] == 0  # one may be a second order
        assert report["none"] == verdicts.count(None)
        before = len(server.asked)
        assert judges.compare(run, items(30))[0] == verdicts and len(server.asked) == before
        changed = [item | {"first": item["first"] + " more"} for item in items(30)]
        judges.compare(run, changed)  # other texts are other questions
        assert len(server.asked) == before + 33
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    with Server(longer, [400, "right"]) as server:  # the very first one is asked again
        run = run_of(small_run, first, server.url, judge_parallel=1)
        report = judges.compare(run, items(30))[1]
        assert (report["requests"], report["none"], report["not_asked"]) == (34, 0, 0)
    with Server(longer, ["right", "right"]) as server:  # and the first after a stop
        run = run_of(small_run, second, server.url, judge_parallel=1, judge_limit=2)
        judges.compare(run, items(30))
        server.trouble += [400] * 5
        run.args.judge_limit = None
        assert judges.compare(run, items(30))[1]["requests"] == 33 + 5


def test_a_server_that_stops_answering_stops_the_stage(small_run, tmp_path, capsys):
    """Ten requests in a row without an answer; what they asked is asked again later. Questions that
    are refused twice, among others that are answered, are none."""
    pytest.importorskip("openai")
    with Server(longer, ["right"] * 3 + [403] * 10) as server:
        run = run_of(small_run, tmp_path, server.url, judge_parallel=1)
        with pytest.raises(SystemExit):
            judges.compare(run, items(30))
        assert "answers 403" in capsys.readouterr().err and len(server.asked) in (13, 14)
        verdicts, report = judges.compare(run, items(30))
        assert report["none"] == report["not_asked"] == 0 and None not in verdicts


def test_many_refusals_and_a_stop_between_do_not_stop_it_again(small_run, tmp_path):
    """Every third question is refused, each time, the first three among them, which stops it as if
    it were the server; then the server is gone, and comes back."""
    pytest.importorskip("openai")
    asked = [x | {"prompt": x["prompt"].replace("?", "!" * (i % 3 == 0))}
             for i, x in enumerate(items(60))]
    with Server(longer, [401 if i == 45 else "odd" for i in range(60)]) as server:
        server.refuse = lambda prompt: "!" in prompt
        run = run_of(small_run, tmp_path, server.url, judge_parallel=1)
        for _ in "ab":
            with pytest.raises(SystemExit):
                judges.compare(run, asked)
        verdicts, report = judges.compare(run, asked)
        assert [v is None for v in verdicts] == [i % 3 == 0 for i in range(60)]
        assert (report["none"], report["not_asked"]) == (20, 0)


def test_a_limit_bounds_the_requests(small_run, tmp_path):
    pytest.importorskip("openai")
    with Server(longer, ["none"] * 3) as server:
        run = run_of(small_run, tmp_path, server.url, judge_limit=30, judge_parallel=1)
        verdicts, report = judges.compare(run, items(100))
        assert len(server.asked) == 30 == report["requests"] and report["none"] == 1
    assert report["not_asked"] == 100 - sum(v is not None for v in verdicts) - 1 >= 70


@pytest.mark.parametrize("trouble, says", [
    (401, "refuses the key in OPENAI_API_KEY (401)"), (404, "knows no model m (404)"),
    (400, "answers 400 (no: ***)"), (403, "answers 403 (no: ***)"), (405, "answers 405 (no: ***)"),
    ("html", "is no chat completion"), ("error", "is no chat completion"),
    ("broken", "is no chat completion"), ("empty", "is no chat completion")])
def test_a_server_that_refuses_is_one_line(small_run, tmp_path, key, capsys, trouble, says):
    pytest.importorskip("openai")
    with Server(longer, [trouble] * 100) as server:
        for _ in "ab":  # the same command again is told the same
            with pytest.raises(SystemExit) as stop:
                judges.compare(run_of(small_run, tmp_path, server.url), items(20))
            error = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
            assert stop.value.code == 2 and len(error) == 1
            assert says in error[0] and KEY not in error[0]


def test_a_key_that_no_request_can_carry(small_run, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "schl\u00fcssel")
    with pytest.raises(SystemExit):
        judges.check_server(run_of(small_run, None, "http://127.0.0.1:9/v1").args)
    error = capsys.readouterr().err
    assert "OPENAI_API_KEY has a letter" in error and "schl" not in error


@pytest.mark.parametrize("flags, says", [
    (["--judge", "nonsense"], "is none of gold, ensemble"),
    (["--judge", "http://127.0.0.1:9/v1"], "--judge_model goes with"),
    (["--judge", "http://127.0.0.1:9/v1", "--judge_model", "m"], "no judge answers at"),
    (["--judge", "http://user:secret@127.0.0.1:9/v1", "--judge_model", "m"], "OPENAI_API_KEY"),
    (["--judge", "model:nowhere/at_all"], "nowhere/at_all"),
    (["--judge", "model:SFT"], "has no chat template"),
    (["--judge", "gold", "--judge_limit", 5], "--judge_limit goes with a judge that reads"),
    (["--judge_limit", 5], "--judge_limit goes with"),
    (["--judge", "model:x", "--judge_limit", 0], "--judge_limit must be 1 or more")])
def test_judges_that_cannot_be_asked(small_run, flags, says, capsys):
    flags = [str(x).replace("SFT", f"{small_run}/01_sft") for x in flags]
    with pytest.raises(SystemExit) as stop:
        import_module("08_evaluate").main(["--out", str(small_run), *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and says in error
    assert error.count("\n") == 1 and "secret" not in error
    assert not (small_run / "08_evaluate.partial").exists()


def kill_after(server, command, replies=8):
    """Start a command, and SIGKILL it when the server has answered so often."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while len(server.asked) < replies:
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_03_labels_by_a_server_killed_on_the_way(run_copy, key):
    """The same command goes on and asks nothing twice; the labels are those of the lengths, verify
    covers the replies, and no file has the key."""
    pytest.importorskip("openai")
    with Server(longer, delay=0.05) as server:
        command = [sys.executable, "03_strength.py", "--out", run_copy, "--M", "2", "--judge",
                   server.url, "--judge_model", "m", "--judge_parallel", "2"]
        kill_after(server, command)
        kept = judges.read_verdicts(run_copy / "03_strength.partial/verdicts.jsonl")
        assert f"{len(kept)} were answered before" in run(*command).stdout
        times = Counter(parts for _, _, parts, _ in server.asked)
    rows = judges.read_verdicts(run_copy / "03_strength/verdicts.jsonl")
    assert rows[:len(kept)] == kept and len({(r["id"], r["order"]) for r in rows}) == len(rows)
    assert sum(n - 1 for n in times.values()) <= 2  # those under way when it was killed
    valid = [json.loads(x) for x in (run_copy / "03_strength/valid.jsonl").open()]
    for row in valid:
        a, b = (len(row[k].strip()) for k in ("chosen", "rejected"))
        assert row["judge_label"] == (-1 if a == b else int(a > b))
    manifest = json.loads((run_copy / "03_strength/manifest.json").read_text())
    assert "03_strength/verdicts.jsonl" in manifest["outputs"]
    assert manifest["metrics"]["judge"]["items"] == len(valid)
    found = subprocess.run(["grep", "-rl", KEY, run_copy], capture_output=True, text=True).stdout
    assert found == "", found


def test_08_by_a_server_killed_has_the_tables_of_an_undisturbed_run(run_copy):
    pytest.importorskip("openai")

    def command(server, *more):
        words = ["08_evaluate.py", "--out", run_copy, "--judge", server.url, "--judge_model", "m",
                 "--judge_parallel", 2, "--both_orders", *more]
        return [sys.executable, *map(str, words)]
    with Server(longer) as server:
        run(*command(server, "--name", "first"))
    with Server(longer, delay=0.05) as server:
        kill_after(server, command(server))
        run(*command(server))
    rows = judges.read_verdicts(run_copy / "08_evaluate/verdicts.jsonl")
    assert len({(row["id"], row["order"]) for row in rows}) == len(rows)
    first, second = (json.loads((run_copy / name / "tables.json").read_text())
                     for name in ("08_evaluate_first", "08_evaluate"))
    for key in ("comparisons", "table_3", "best_round"):
        assert first[key] == second[key]
    assert second["mean_score"] == {} and second["report"]["flip_rate"] == 0
    by = {(r["policy"], r["set"], r["id"]): r["response"].strip() for r in map(json.loads, (
        run_copy / "08_evaluate/responses.jsonl").open())}
    for row in second["comparisons"]:  # round_0 against SFT: by the lengths
        lengths = [(len(text), len(by["sft", name, i])) for (policy, name, i), text in by.items()
                   if policy == row["policy"] and name == row["set"]]
        assert row["win"] == pytest.approx(np.mean([a > b for a, b in lengths]))
        assert row["tie"] == pytest.approx(np.mean([a == b for a, b in lengths]))
    judges.main(["agree", f"{run_copy}/08_evaluate", f"{run_copy}/08_evaluate_first"])


@pytest.fixture(scope="module")
def chat_model(small_run, tmp_path_factory):
    """A tiny random chat model whose context holds the judge's question."""
    path = tmp_path_factory.mktemp("chat")
    tokenizer = AutoTokenizer.from_pretrained(small_run / "01_sft")
    tokenizer.chat_template = ("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n"
                               "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=4096))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_local_model_s_verdict_is_its_likeliest_letter(run_copy, chat_model):
    """Against stock transformers, one question at a time; and two processes at ZeRO-3 give the
    same."""
    flags = ["--out", run_copy, "--M", 2, "--judge", f"model:{chat_model}"]
    python_stages(["03_strength", *flags])
    rows = judges.read_verdicts(run_copy / "03_strength/verdicts.jsonl")
    valid = {r["id"]: r for r in map(json.loads, (run_copy / "03_strength/valid.jsonl").open())}
    model = AutoModelForCausalLM.from_pretrained(chat_model)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    by_id = {item["id"]: item for item in judges.pair_items(valid.values())}
    assert {row["id"] for row in rows} == set(valid) and len(rows) > len(valid)
    for row in rows[:12]:
        text = judges.question(by_id[row["id"]], row["order"], judges.AT_ONCE,
                               judges.marks_of(tokenizer))
        chat = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                             add_generation_prompt=True)
        logps = []
        for letter in "ABC":
            ids = tokenizer(f"{chat}[[{letter}]]", add_special_tokens=False)["input_ids"]
            n = judges.verdict_ids(tokenizer, chat)[0]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0]
            logps.append(torch.log_softmax(logits[len(n) - 1], -1)[ids[len(n)]].item())
        assert row["verdict"] == "ABC"[int(np.argmax(logps))]
        assert [float(x) for x in row["reply"].split()[1::2]] == pytest.approx(logps, abs=2e-3)
    before = {(r["id"], r["order"]): r["verdict"] for r in rows}
    ranks(2, "03_strength.py", *flags, "--zero", 3, "--eval_batch_size", 7)
    again = judges.read_verdicts(run_copy / "03_strength/verdicts.jsonl")
    assert {(r["id"], r["order"]): r["verdict"] for r in again} == before


def test_a_local_model_of_no_numbers_gives_no_verdict(small_run, chat_model, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(chat_model)
    model.lm_head.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(chat_model).save_pretrained(tmp_path / "broken")
    run = run_of(small_run, tmp_path, f"model:{tmp_path}/broken", judge_model=None, zero=0,
                 precision="fp32", eval_batch_size=2)
    with pytest.raises(SystemExit):
        judges.compare(run, items(3))
    assert "3 of 3 values of the model are not finite" in capsys.readouterr().err
    assert not (tmp_path / "verdicts.jsonl").exists()


def test_people_s_sheet_is_read_as_it_was_written(run_copy, tmp_path, capsys):
    """Items in the judge's own order; people who prefer the longer agree with a judge who does."""
    import csv
    import io
    judges.main(["sheet", str(run_copy / "03_strength"), "--n", "15"])
    sheet = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(sheet) == 15 and set(sheet[0]) == {"id", "prompt", "response A", "response B",
                                                  "verdict"}
    valid = {r["id"]: r for r in map(json.loads, (run_copy / "03_strength/valid.jsonl").open())}
    with open(tmp_path / "people.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, sheet[0])
        writer.writeheader()
        writer.writerows(row | {"verdict": longer("", row["response A"], row["response B"])}
                         for row in sheet)
    found = judges.verdicts_of(tmp_path / "people.csv")
    for i, v in found.items():
        assert v == np.sign(len(valid[i]["chosen"]) - len(valid[i]["rejected"]))
    judges.main(["agree", str(tmp_path / "people.csv"), str(tmp_path / "people.csv")])
    assert "the same on 100.0% of 15 items" in capsys.readouterr().out
    (tmp_path / "bad.csv").write_text("id,verdict\nx,maybe\n")
    with pytest.raises(SystemExit):
        judges.verdicts_of(tmp_path / "bad.csv")
    assert "bad.csv:2" in capsys.readouterr().err


def test_the_driver_hands_the_judge_on(chat_model, tmp_path, monkeypatch, capsys):
    """A judge that reads to 03 and 08, gold to 08; one that cannot be asked is told at once."""
    from lab import experiments

    def plan(*flags):
        monkeypatch.setattr(sys, "argv", ["experiments.py", "--plan", "--out",
                                          str(tmp_path / "out"), *map(str, flags)])
        experiments.main()
        rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        return {row[1][:2]: row[4] for row in rows if "--judge" in row[4]}
    told = plan("--judge", f"model:{chat_model}", "--both_orders")
    assert list(told) == ["03", "08"]
    assert all(f"--judge model:{chat_model} --both_orders" in x for x in told.values())
    assert list(plan("--judge", "gold")) == list(plan(
        "--judge", "gold", "--preferences", "toy")) == ["08"]
    (tmp_path / "my.jsonl").write_text("{}\n")
    for flags, says in ((["--judge", "nonsense"], "is none of"), (["--judge_limit", 3], "--judge"),
                        (["--judge", "gold", "--preferences", tmp_path / "my.jsonl"],
                         "embedded world only"),
                        (["--judge", "gold", "--preset", "paper", "--model", chat_model],
                         "embedded world only")):
        with pytest.raises(SystemExit):
            plan(*flags)
        assert says in capsys.readouterr().err
