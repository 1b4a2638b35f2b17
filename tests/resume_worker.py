"""Stages cut off after a checkpoint and started again, for test_audit.py: the outputs must be those
of an undisturbed
run. `resume_worker.py RESULTS.json OUT STAGE:ZERO...`, on any number of processes."""
import json
import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import common  # noqa: E402
from lab import checkpoint  # noqa: E402

COMMON = ["--limit", 5, "--save_every", 2, "--micro_batch_size", 8]
FLAGS = {
    "01_sft": ("01_sft", ["--hidden_size", 64]),
    "02_rm_ensemble": ("02_rm_ensemble/rm_00", ["--members", 0]), "04_rm_denoise":
        ("04_rm_denoise/cut", ["--methods", "soft_margin", "--name", "cut", "--eval_every", 3]),
    "05_rm_contrastive":
        ("05_rm_contrastive/cut",
         ["--methods", "swav", "--name", "cut", "--freeze_prototypes", 1, "--tsne_pairs",
          10]), "06_ppo": ("06_ppo/round_0", ["--round", 0, "--eval_every", 2]), "07_metarm":
              ("07_metarm/round_1",
               ["--round", 1, "--meta_prompts", 40, "--eval_every", 3, "--equation_17", 1]),}
argv = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
results, out, cases, save = {}, Path(argv[1]), argv[2:], checkpoint.save


class Killed(Exception):
    pass


def save_and_die(stage, step):
    save(stage, step)
    if step == 4:
        if common.rank() == 0:
            (stage.dir / "model.safetensors").write_text("half written")
            stage.metrics_file.write('{"step": 5, "half')
        raise Killed


def go(script, flags):
    import_module(script).main(["--out", str(out), *map(str, flags)])


def outputs(name):
    common.barrier()
    return json.loads((out / name / "manifest.json").read_text())["outputs"]


for case in cases:
    script, zero = case.split(":")
    name, flags = FLAGS[script]
    flags = [*COMMON, *flags, "--zero", zero]
    go(script, flags)
    undisturbed = outputs(name)
    if script[:2] in ("02", "04", "05"):  # or it is kept
        flags = [*flags, "--restart"]
    checkpoint.save = save_and_die
    try:
        go(script, flags)
    except Killed:
        pass
    checkpoint.save = save
    common.barrier()
    partial = out / f"{name}.partial"
    kept = sorted(p.name for p in partial.glob("checkpoint*"))
    common.barrier()
    if common.rank() == 0:  # as if the kill fell into the removal of the one before
        (partial / "checkpoint_2").mkdir()
        (partial / "checkpoint_2/checkpoint.json").write_text('{"step": 2}')
    common.barrier()
    go(script, [flag for flag in flags if flag != "--restart"])
    resumed = outputs(name)
    results[case] = {"kept": kept, "files": len(undisturbed),
                     "different": [p for p in undisturbed if undisturbed[p] != resumed.get(p)]}
if common.rank() == 0:
    Path(argv[0]).write_text(json.dumps(results))
