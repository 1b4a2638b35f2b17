"""Whether one reward model comes out at every ZeRO stage, in every precision and layout, on a GPU
where there is one.

    python bench/agreement.py       five minutes on two slow cores

Stage 04's baseline on the embedded world, six steps of training from the same SFT model. Beside it
the difference of its weights from the first row's, over what training moved them there: the largest
of each, and in norm. Adam moves a weight by its learning rate however small the gradient is, so
where rounding turns a sign the largest difference can be twice the move. Then whether a command
gives its bytes again, with --deterministic and without, and whether MetaRM at eta = 0 gives the
baseline's.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import harness
import torch
from safetensors.torch import load_file

CASES = [(f"ZeRO {zero}, {precision}", ["--zero", str(zero), "--precision", precision])
         for precision in ("fp32", "autocast", "bf16") for zero in range(4)]
CASES += [("separate layout, fp32", ["--layout", "separate"]), ("once more, fp32", []),
          ("deterministic, fp32", ["--deterministic"]),
          ("deterministic, once more", ["--deterministic"])]
EQUAL = [("a command once more", "ZeRO 0, fp32", "once more, fp32"),
         ("--deterministic once more", "deterministic, fp32", "deterministic, once more"),
         ("MetaRM at eta 0, the baseline", "deterministic, fp32", "eta 0")]


def train(out, limit):
    """Every case in one run directory. → {case: (weights, accuracy)}"""
    def run(*words):
        subprocess.run([sys.executable, *words, "--out", out], check=True, cwd=harness.HERE.parent)

    def made(folder):
        metrics = json.loads((folder / "manifest.json").read_text())["metrics"]
        return load_file(folder / "model.safetensors"), metrics["accuracy_original"]
    run("00_data.py", "--limit", str(limit))
    for words in (["01_sft.py"], ["02_rm_ensemble.py", "--M", "2"], ["03_strength.py", "--M", "2"]):
        run(*words)
    baseline = ["04_rm_denoise.py", "--methods", "baseline"]
    for i, (_, flags) in enumerate(CASES):
        run(*baseline, "--name", f"case_{i:02d}", *flags)
    run(*baseline, "--deterministic")
    run("07_metarm.py", "--round", "1", "--first_samples", "sft", "--eta", "0", "--name", "eta_0",
        "--equation_17", "0", "--deterministic")
    found = {case: made(out / f"04_rm_denoise/case_{i:02d}") for i, (case, _) in enumerate(CASES)}
    return {**found, "eta 0": made(out / "07_metarm/eta_0"), "SFT": (load_file(
        out / "01_sft/model.safetensors"), None)}


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--limit", type=int, default=6, help="steps (6)")
    flags.add_argument("--json", help="where to write (bench/agreement.json)")
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = train(Path(folder) / "out", args.limit)
    first = found[CASES[0][0]][0]

    def apart(other):  # the largest difference, and its norm
        x = torch.cat([(first[k] - w).flatten() for k, w in other.items() if k in first])
        return x.abs().max().item(), x.norm().item()
    move = apart(found["SFT"][0])
    rows = [{"case": case, **{name: a / b for name, a, b in zip(
        ("largest", "in norm"), apart(found[case][0]), move)}, "accuracy": found[case][1]}
        for case, _ in CASES]
    equal = {what: all(torch.equal(found[a][0][name], w) for name, w in found[b][0].items())
             for what, a, b in EQUAL}
    for what, same in equal.items():
        print(f"{what}: {'the same bytes' if same else 'OTHER BYTES'}")
    harness.report("agreement", rows, list(rows[0]), args.json, move=move, equal=equal)


if __name__ == "__main__":
    main()
