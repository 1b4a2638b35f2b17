"""bench/memory.py against measured peaks, and docs/scale.md against bench/memory.py."""
import json
import sys
import time
from importlib import import_module

import pytest
import torch
from conftest import ROOT, ranks, run

from lab import base

sys.path.insert(0, str(ROOT / "bench"))
BUCKET = 500_000_000  # numbers: it would hide all else of a small model
ONE = [{"kind": "reward"}, {"kind": "reward", "H": 256, "kv": 1}, {"kind": "reward", "K": 6},
       {"kind": "reward", "checkpointing": True, "layers": 8},
       {"kind": "policy"}, {"kind": "policy", "V": 6000, "precision": "bf16"},
       {"kind": "policy", "checkpointing": True, "layers": 8, "precision": "autocast"},
       {"kind": "policy", "head_dim": 64, "kv": 2, "tied": True, "precision": "autocast"},
       {"kind": "sampling", "prompt": 128, "response": 8},
       {"kind": "sampling", "precision": "bf16", "response": 16},
       {"kind": "sampling", "precision": "autocast", "response": 8},
       {"kind": "metarm", "precision": "autocast", "zero": 3}]
TWO = [{"kind": "reward", "zero": 1}, {"kind": "reward", "zero": 2, "precision": "bf16"},
       {"kind": "policy", "zero": 3},
       {"kind": "metarm", "zero": 3, "precision": "autocast"}]


@pytest.mark.parametrize(("processes", "cases"), [(1, ONE), (2, TWO)])
def test_memory_is_what_the_formula_says(processes, cases, tmp_path):
    ranks(processes, "tests/memory_worker.py", tmp_path / "found.json", *map(json.dumps, cases))
    wrong = []
    for case, (expected, measured) in zip(cases, json.loads((tmp_path / "found.json").read_text())):
        bf16 = case.get("precision") == "bf16"
        engine = case["kind"] != "sampling"  # which has a bucket
        bucket = BUCKET * (2 if bf16 else 4) * bool(case.get("zero") or bf16 and engine)
        print(case, ratio := (expected - bucket) / (measured - bucket))
        if not 0.9 < ratio < 1.1:
            wrong.append((case, ratio))
    assert not wrong


def test_benchmarks_still_fit_the_code():
    """What bench/ calls of the stages, once, on the smallest model; its figures are measured by
    hand, so that nothing else would tell."""
    done = run(sys.executable, "-c", """
import sys
sys.path[:0] = ["bench", "."]
import harness, metarm, ppo, rm, scale
path, config = harness.make_model("0.6m")
case = {**scale.CASE, "pairs": 12, "batch": 4, "micro": 4}
for found in (*(rm.one({**case, "impl": impl}) for impl in ("shared", "separate")),
              metarm.one({"size": "0.6m", "precision": "fp32", "zero": 0, "k": 2, "steps": 1}),
              *scale.files(1, "0.6m")):
    assert found["seconds"] > 0, found
ppo.PROMPTS, ppo.MINI, ppo.T = 2, 2, 4
prompts = [g["prompt"] for g in harness.groups_of([(8, 1)] * 4, config.vocab_size)]
assert ppo.ours(path, prompts, 2)["update"] > 0 < ppo.generate(path, prompts, 2)["seconds"]
print("ALL RAN")
""")
    assert "ALL RAN" in done.stdout


def test_tables_are_of_this_code_and_fit():
    import memory
    text = (ROOT / "docs/scale.md").read_text()
    assert "too much" not in text
    for name, config, preset, G, most in memory.CASES:
        tables = memory.hyperparameters(preset)
        assert memory.report(name, config, tables, preset, G, most) in text


def test_bf16_is_called_fast_where_it_is():
    """Without instructions for it a CPU emulates bf16: by a hundred times, not by a few."""
    def seconds(dtype):
        x, start = torch.ones(512, 512, dtype=dtype), time.perf_counter()
        for _ in range(3):
            x @ x
        return time.perf_counter() - start
    seconds(torch.float32)
    assert base.FAST_BF16 == (torch.cuda.is_available() or
                              seconds(torch.bfloat16) < 10 * seconds(torch.float32))


@pytest.mark.parametrize("fast", [True, False])
def test_small_takes_bf16_where_it_is_fast(fast, capsys, monkeypatch):
    monkeypatch.setattr(base, "FAST_BF16", fast)
    for stage in ("02_rm_ensemble", "07_metarm", "08_evaluate"):
        for flags, expected in (([], "autocast" if fast else "fp32"),
                                (["--precision", "autocast"], "autocast")):
            with pytest.raises(SystemExit):
                import_module(stage).main(["--preset", "small", "--dry_run", *flags])
            assert json.loads(capsys.readouterr().out)["precision"] == expected
