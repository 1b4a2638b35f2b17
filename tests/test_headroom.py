"""lab/headroom.py on tiny sizes, and its numbers on a run that is made up."""
import json
import sys

import pytest
from conftest import run

from lab import headroom


def test_headroom_runs_whole_and_keeps_what_is_complete(tmp_path):
    command = sys.executable, "lab/headroom.py", "--seeds", 100, "--limit", 1, "--out", tmp_path
    first, again = run(*command), run(*command)
    found = json.loads((tmp_path / "headroom.json").read_text())["found"]
    assert set(found) == set(headroom.WANTED) and all(found.values())
    assert first.stdout.count("done in") == 2 * 9 and again.stdout.count("done in") == 0
    assert first.stdout.splitlines()[-11:] == again.stdout.splitlines()[-11:]  # the table
    policies = json.loads((tmp_path / "seed_100/08_evaluate/tables.json").read_text())
    assert {"gold", "round_0"} <= set(policies["mean_score"])
    for kind in ("gold", "round_0"):  # the reward of one is the truth itself
        rows = [json.loads(x) for x in (tmp_path / f"seed_100/06_ppo/{kind}/metrics.jsonl").open()]
        assert (abs(rows[0]["reward"] - rows[0]["gold"]) < 1e-4) == (kind == "gold")


def test_measure_counts_what_is_written(tmp_path, monkeypatch):
    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    ask = "\n\nHuman: Tell me about owls.\n\nAssistant:"
    write("00_data/train.jsonl", [
        {"chosen": "a", "rejected": "b", "gold_chosen": c, "gold_rejected": r}
        for c, r in ((1, 0), (2, 0), (3, 1), (0, 1), (1, 1))])
    write("00_data/gold.jsonl", [{"id": "1", "task": "helpful"}, {"id": "2", "task": "harmless"},
                                 {"id": "cut to one text", "task": "helpful"}])
    write("04_rm_denoise/baseline/scores.jsonl", [  # under the labels as they are
        {"gold": {"1": [0, 1], "2": [0, 1]}}, {"gold": {"1": [1.0, 0.5], "2": [0.2, 0.3]}}])
    write("08_evaluate/tables.json", [{"comparisons": [
        {"set": "eval_helpful", "policy": "gold", "opponent": "sft", "win": 0.75, "lose": 0.25},
        {"set": "eval_helpful", "policy": "gold", "opponent": "round_0", "win": 1, "lose": 0},
        {"set": "ood_helpful", "policy": "gold", "opponent": "sft", "win": 1, "lose": 0}]}])
    write("08_evaluate/responses.jsonl", [
        {"policy": "sft", "set": "eval_helpful", "prompt": ask, "response": text}
        for text in (" Most owls hunt at night and sleep by day.", " Owls fly with.", " Most owls",
                     " Cats sleep for most of the day.")])
    monkeypatch.setattr(headroom, "accuracy",  # under labels put right
                        lambda out, rows, gold: headroom.torch.tensor([1.0] * len(gold)))
    found = headroom.measure(tmp_path)
    assert found == pytest.approx({
        "labels that agree with gold": 3 / 4, "clean minus noisy labels": 0.5,
        "clean minus noisy labels, helpful": 0.0, "gold as reward, helpful": 0.5,
        "SFT responses garbled or broken off": 0.5})
    row = {"chosen": "a", "rejected": "b", "gold_chosen": 0, "gold_rejected": 1}
    assert headroom.put_right(row)["chosen"] == "b"
    assert headroom.put_right(row | {"gold_chosen": 1})["chosen"] == "a"
