"""The record of a run: hyperparameters from the command line, stage directories and their manifests.

A stage writes into `<out>/<name>.partial`; `finish_stage` writes manifest.json last and renames the directory, so a
directory with its final name is complete. README, "A run directory", says what a manifest holds.
"""
import argparse
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch

from common import barrier, device, die, log, rank, world_size

CHOICES = {"preset": ("paper", "toy"), "zero": (0, 1, 2, 3), "precision": ("fp32", "bf16", "autocast"),
           "layout": ("auto", "shared", "separate")}


def parse_args(doc, hparams, add_flags=None, argv=None, reads_run=True):
    """Resolve a stage's hyperparameters: a flag if given, else the column of the run's preset.

    `hparams`: {name: (paper value, toy value, help)}. `add_flags(parser)` adds the stage's own flags.
    Returns a namespace that also holds `run` (the contents of run.json) and `hparams` (resolved values).
    `--dry_run` prints the resolved values as JSON and exits.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    flag = parser.add_argument_group("run").add_argument
    flag("--out", default="out", help="run directory (default: out)")
    flag("--preset", choices=CHOICES["preset"], help="column of the table below (default: the run's; toy)")
    flag("--seed", type=int, help="random seed (default: the run's; 0)")
    flag("--limit", type=int, help="smoke run: at most N optimiser or roll-out steps in every loop, 64*N rows a split")
    flag("--layout", choices=CHOICES["layout"], default="auto",
         help="prompt once per group (shared), one row per response (separate), or probe the model (auto)")
    flag("--dry_run", action="store_true", help="print the resolved hyperparameters and stop")
    flag("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    if add_flags:
        add_flags(parser.add_argument_group("stage").add_argument)
    flag = parser.add_argument_group("hyperparameters").add_argument
    for name, (paper, toy, text) in hparams.items():
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(paper, bool) else \
               {"type": type(paper), "choices": CHOICES.get(name)}
        flag(f"--{name}", help=f"{text} (paper {paper}, toy {toy})", default=None, **kind)
    args = parser.parse_args(argv)

    run_file = Path(args.out) / "run.json"
    args.run = json.loads(run_file.read_text()) if run_file.exists() and reads_run else {}
    if reads_run and not args.run and not args.dry_run:
        die(f"{run_file} is missing: run `python 00_data.py --out {args.out}` first")
    for name, default in (("preset", "toy"), ("seed", 0), ("limit", None)):
        if getattr(args, name) is None:
            setattr(args, name, args.run.get(name, default))
    column = CHOICES["preset"].index(args.preset)
    for name, row in hparams.items():
        if getattr(args, name) is None:
            setattr(args, name, row[column])
    args.hparams = {name: getattr(args, name) for name in hparams}
    if args.dry_run:
        log(json.dumps({"stage": Path(sys.argv[0]).stem, "preset": args.preset, "seed": args.seed, **args.hparams}))
        sys.exit(0)
    return args


def read_jsonl(path):
    """All rows of a JSON-lines file."""
    try:
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except FileNotFoundError:
        die(f"{path} is missing")


def write_jsonl(path, rows):
    """Write rows as JSON lines."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def require(args, name, command):
    """Directory of a finished stage; one-line error naming the command when it is not there."""
    path = Path(args.out) / name
    if not (path / "manifest.json").exists():
        die(f"{path} is missing or unfinished: run `{command} --out {args.out}` first")
    return path


def sha256(path):
    """Hex digest of a file, streamed."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def start_stage(args, name, inputs=()):
    """Open `<out>/<name>.partial`; `finish_stage` renames it, so a directory with its final name is complete.

    `inputs`: the files or stage directories that the stage reads, relative to `--out`.
    """
    stage = SimpleNamespace(args=args, name=name, final=Path(args.out) / name, inputs=inputs, start=time.time(),
                            dir=Path(args.out) / f"{name}.partial")
    if rank() == 0:
        shutil.rmtree(stage.dir, ignore_errors=True)
        stage.dir.mkdir(parents=True)
        stage.metrics_file = open(stage.dir / "metrics.jsonl", "w", encoding="utf-8")
    barrier()
    return stage


def kept(args, name, inputs):
    """True when a launch of several models was cut short after it finished `name` from these hyperparameters and
    inputs. A launch that ended has written figures/ beside its models: run again by hand, it trains all anew."""
    manifest = Path(args.out) / name / "manifest.json"
    if (manifest.parent.parent / "figures").exists() or not manifest.exists():
        return False
    made = json.loads(manifest.read_text())
    same = all(made[k] == v for k, v in (("hyperparameters", args.hparams), ("seed", args.seed), ("limit", args.limit),
                                           ("inputs", input_hashes(Path(args.out), inputs))))
    if same:
        log(f"{manifest.parent}: complete, kept")
    return same


def log_metrics(stage, step, quiet=False, **values):
    """Append one JSON object to metrics.jsonl and, unless `quiet`, print it (rank 0)."""
    if rank() == 0:
        values = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        values = {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
        stage.metrics_file.write(json.dumps({"step": step, **values}) + "\n")
        stage.metrics_file.flush()
        if quiet:
            return
        from tqdm import tqdm
        tqdm.write(f"  {stage.name} step {step}: " + "  ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()))


def input_hashes(out, inputs):
    """{path: sha256} of the inputs, as recorded by the stages that made them (figures and curves left out)."""
    hashes = {}
    for name in inputs:
        folder = next(p for p in [out / name, *(out / name).parents] if (p / "manifest.json").exists())
        for path, digest in json.loads((folder / "manifest.json").read_text())["outputs"].items():
            if (path == name or path.startswith(f"{name}/")) and not path.endswith((".png", "metrics.jsonl")):
                hashes[path] = digest
    return hashes


def finish_stage(stage, metrics):
    """Write manifest.json and give the directory its final name (rank 0). `metrics`: the headline numbers."""
    args, out = stage.args, Path(stage.args.out)
    if rank() == 0:
        stage.metrics_file.close()

        def git(*words):
            return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True).stdout

        files = sorted(p for p in stage.dir.rglob("*") if p.is_file())
        here = Path(__file__).resolve().parent
        # every file of the project that this process runs: 05 and 07 use 04's losses, for example
        loaded = {Path(m.__file__).resolve() for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
        code = sorted(p for p in loaded | {here / f"{stage.name.split('/')[0]}.py"} if p.parent == here)
        manifest = {
            "stage": stage.name, "command": shlex.join(sys.argv), "preset": args.preset, "seed": args.seed,
            "limit": args.limit, "layout": args.layout, "hyperparameters": args.hparams,
            "start": datetime.fromtimestamp(stage.start, timezone.utc).isoformat(timespec="seconds"),
            "end": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.time() - stage.start, 1),
            "git_commit": git("rev-parse", "HEAD").strip(),
            "git_dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
            "code": {p.name: sha256(p) for p in code if p.is_file()},
            "packages": {p: version(p) for p in ("torch", "transformers", "deepspeed", "tokenizers", "numpy")},
            "python": platform.python_version(),
            "hardware": torch.cuda.get_device_name() if device().type == "cuda" else
            f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
            "world_size": world_size(),
            "inputs": input_hashes(out, stage.inputs),
            "outputs": {f"{stage.name}/{p.relative_to(stage.dir)}": sha256(p) for p in files},
            "metrics": metrics,
        }
        temporary = stage.dir / "manifest.json.tmp"
        temporary.write_text(json.dumps(manifest, indent=1) + "\n")
        temporary.rename(stage.dir / "manifest.json")
        old = stage.final.with_name(stage.final.name + ".old")
        if stage.final.exists():  # run again by hand: the finished directory stays until the new one is complete
            shutil.rmtree(old, ignore_errors=True)
            stage.final.rename(old)
        stage.dir.rename(stage.final)
        shutil.rmtree(old, ignore_errors=True)
    barrier()
    log(f"{stage.final}: done in {(time.time() - stage.start) / 60:.1f} min  " + json.dumps(metrics))


def pyplot():
    """matplotlib without a display, imported late."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"figure.dpi": 110, "axes.grid": True, "grid.alpha": 0.3, "savefig.bbox": "tight"})
    return plt
