"""The record of a run: flags and presets, stage directories, exact resume, manifests.

A stage asks `parse_args` for its hyperparameters and `require` for what it reads, then

    run = begin(args, "04_rm_denoise/flip", inputs)    opens NAME.partial, or goes on with it
    for step, batch in run.steps(batches, rm=engine):  after each: finite? checkpoint? signal?
        run.note(loss=loss)                            of each micro batch
        if run.due(step): run.log(step, ...)           a line of metrics.jsonl
    run.finish(accuracy=...)                           manifest.json, then the final name

so a directory with its final name is complete. docs/audit.md says what is kept and compared.
"""
import argparse
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from lab import base, card, checkpoint, forks
from lab.base import (  # noqa: F401  (some for common to hand on)
    EVENTS, HERE, SAMPLING, STOPPED, barrier, check_shared, check_value, code_hashes, device, die,
    finite, first_line, free, from_rank_0, gather_rows, inference, initialize, lock, log,
    new_parser, progress, rank, read_json, read_jsonl, recompute_activations, replace_attention,
    save_stock, set_seed, setup, subset, sync, user_files, world_size, write_jsonl, write_text)
from lab.manifest import (  # noqa: F401
    canonical, current, digest_of, finished, hash_text, input_hashes, is_name, require)

CHOICES = {"preset": ("paper", "small", "toy"), "zero": (0, 1, 2, 3),
           "precision": ("fp32", "bf16", "autocast"), "layout": ("auto", "shared", "separate"),
           "first_samples": ("sft", "policy")}
# Rows shared by the tables of all training stages: name: (paper, small, toy, help).
TRAINING = {
    "zero": (2, 0, 0, "DeepSpeed ZeRO stage"),
    "precision": ("bf16", "autocast", "fp32", "bf16: parameters in bf16, master copy in fp32; "
                  "autocast: parameters in fp32; small: fp32 where a CPU has no bf16"),
    "max_grad_norm": (1.0, 1.0, 1.0, "gradient clipping"),
    "gradient_checkpointing": (True, False, False, "recompute activations in the backward pass"),
    "save_every": (200, 50, 25, "steps between checkpoints, from which the same command goes on"),
}
SIZES = {"micro_batch_size", "eval_batch_size", "zero", "gradient_checkpointing"}  # of training
asked_to_stop, open_stages = {}, []


# ---------------------------------------------------------------- flags

def parse_args(doc, hparams, add_flags=None, argv=None, reads_run=True):
    """Resolve a stage's hyperparameters: a flag if given, else the column of the run's preset.

    hparams: {name: (paper, small, toy, help)}; add_flags(flag) adds the stage's own. → a namespace
    that also holds `run` (run.json) and `hparams`. --dry_run prints them and exits.
    """
    parser = base.new_parser(doc, allow_abbrev=False)
    flag = parser.add_argument_group("run").add_argument
    flag("--out", default="out", help="run directory (default: out)")
    flag("--preset", choices=CHOICES["preset"], help="column of the tables (default: "
         "toy for --model tiny of stage 00, small for any other)")
    flag("--seed", type=int, help="random seed (default: the run's; 0)")
    flag("--limit", type=int, help="smoke run: at most N optimiser or roll-out steps in every "
         "loop, 64*N rows to train on and 16*N to evaluate")
    flag("--layout", choices=CHOICES["layout"], default="auto", help="prompt once per group "
         "(shared), one row per response (separate), or probe the model (auto)")
    flag("--dry_run", action="store_true", help="print the resolved hyperparameters and stop")
    flag("--restart", action="store_true", help="begin anew: leave an unfinished directory's "
         "checkpoint; in 02, 04 and 05 train finished models again")
    flag("--deterministic", action="store_true", help="on a GPU: only kernels that give the same "
         "bits every time; slower, an operation without one is an error")
    flag("--tensorboard", action="store_true", help="metrics as event files of TensorBoard too")
    flag("--debug", action="store_true", help="show the traceback of an error")
    flag("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    add_flags and add_flags(parser.add_argument_group("stage").add_argument)
    flag = parser.add_argument_group("hyperparameters").add_argument
    for name, (*row, text) in hparams.items():
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(row[0], bool) else \
               {"type": type(row[0]), "choices": CHOICES.get(name)}
        values = ", ".join(f"{preset} {value}" for preset, value in zip(CHOICES["preset"], row))
        flag(f"--{name}", help=f"{text} ({values})", default=None, **kind)
    args = parser.parse_args(argv)

    run_file = Path(args.out) / "run.json"
    args.run = read_json(run_file) if run_file.exists() and reads_run else {}
    if reads_run and not args.run and not args.dry_run:
        die(f"{run_file} is missing: run `python 00_data.py --out {args.out}` first")
    column = "toy" if getattr(args, "model", None) in (None, "tiny") else "small"
    for name, default in (("preset", column), ("seed", 0), ("limit", None)):
        if getattr(args, name) is None:
            setattr(args, name, args.run.get(name, default))
    if args.limit is not None and args.limit < 1:
        die(f"--limit must be positive, not {args.limit}")
    if not 0 <= args.seed < 2**31:
        die(f"--seed must lie between 0 and {2**31 - 1}, not {args.seed}")
    column = CHOICES["preset"].index(args.preset)
    for name, row in hparams.items():
        value = base.value_of(args, name, row, column)
        check_value(name, value, row)
        if args.limit and name == "save_every":
            value = min(value, max(1, args.limit // 2))  # a smoke run tries checkpoints too
        setattr(args, name, value)
    args.hparams = {name: getattr(args, name) for name in hparams}
    if args.dry_run:
        log(json.dumps({"stage": Path(sys.argv[0]).stem, "preset": args.preset, "seed": args.seed,
                        **args.hparams}))
        sys.exit(0)
    return args


# ---------------------------------------------------------------- one stage

def begin(args, name, inputs=(), keep=False, script=None):
    """Open `<out>/NAME.partial`, or go on with it where a checkpoint of the same command is kept.

    inputs: as `manifest.input_hashes` takes them. With `keep` a finished directory of the same
    settings stays as it is (02, 04 and 05 make several). script: its file, if that is not NAME's.
    → a Stage, or None where it is kept. Stops when another process holds the run directory, or
    when the checkpoint is of other settings.
    """
    if sum(gather_rows([(rank(), len(asked_to_stop))])):  # in the last step of the model before
        log("stopped by a signal; the same command goes on from there")
        sys.exit(STOPPED)
    stage = Stage(args, name, script or f"{name.split('/')[0]}.py")
    stage.settings, stage.checkpoint = from_rank_0(
        lambda: stage.open(inputs, keep and not args.restart))
    world_size() > 1 and check_shared(stage.out)
    if stage.settings is None:
        return None
    if stage.checkpoint:
        stage.done, stage.state = stage.checkpoint["step"], stage.checkpoint["state"]
    open_stages.append(stage)
    return stage


class Stage:
    """A stage at work. dir: where it writes; done: steps made before this process; state: what a
    checkpoint keeps for the stage (JSON); total: steps in all."""

    def __init__(self, args, name, script):
        self.args, self.name, self.script, self.out = args, name, script, Path(args.out)
        self.final, self.dir = self.out / name, self.out / f"{name}.partial"
        self.start, self.done, self.total, self.state = time.time(), 0, 0, {}
        self.engines, self.noted, self.checkpoint, self.metrics_file = {}, {}, None, None
        self.add_events = None

    def open(self, inputs, keep):
        """Rank 0's part of `begin` → (settings, checkpoint.json or None); (None, None) where the
        finished directory is kept."""
        args = self.args
        self.out.mkdir(parents=True, exist_ok=True)
        lock(self.out, ".lock" if self.name != "09_report" else ".report_lock")  # read at any time
        promote(self.dir)  # a process was killed just before it did
        settings = json.loads(json.dumps({
            "preset": args.preset, "seed": args.seed, "limit": args.limit, "layout": args.layout,
            "deterministic": args.deterministic, "world_size": world_size(),
            "hyperparameters": args.hparams, "inputs": input_hashes(self.out, inputs)}))
        if keep and (self.final / "manifest.json").exists():
            made = read_json(self.final / "manifest.json")
            if not (different := differences(made, settings)):
                other = made["code"] != code_hashes(self.script)
                log(f"{self.final}: complete, kept (--restart trains it again)" +
                    "; made by other code than is here now" * other)
                return None, None
            log(f"{self.final} was made otherwise ({'; '.join(different)}): it is trained again")
        found = {} if args.restart else checkpoint.newest(self.dir)
        but = SIZES if found.get("step") == 0 else ()  # what is drawn before it depends on none
        if found and (different := differences(found["settings"], settings, but)):
            die(f"{self.dir} holds step {found['step']} of a command that differs in "
                f"{'; '.join(different)}: give the same again, or --restart to begin anew")
        self.dir.mkdir(parents=True, exist_ok=True)
        for path in self.dir.iterdir():  # what a killed process wrote after the checkpoint
            if not found or path.name not in ("metrics.jsonl", "samples.jsonl", "verdicts.jsonl",
                                              found["folder"]) and EVENTS not in path.name:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.metrics_file = open(self.dir / "metrics.jsonl", "a+", encoding="utf-8")
        self.metrics_file.seek(self.metrics_file.truncate(found.get("metrics_bytes", 0)))
        self.add_events = base.event_writer(args, self.dir, found.get("step", 0))
        return settings, found

    def steps(self, batches, **engines):
        """Yield (step, batch) for what is left of a list of batches. After each step: stop on a
        noted number that is infinite or NaN; write a checkpoint every --save_every steps, and
        after a signal, which ends the process with exit code 75."""
        self.engines, self.total = engines, len(batches)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, ask_to_stop)
        if self.done:
            checkpoint.load(self)
        todo = range(self.done + 1, self.total + 1)
        for step in progress(todo, self.name, self.total, self.done):
            self.noted, self.batch = {}, batches[step - 1]
            yield step, self.batch
            self.check(step)
            signals = sorted(set(sum(gather_rows([(rank(), list(asked_to_stop))]), [])))
            if step < self.total and (signals or step % self.args.save_every == 0):
                checkpoint.save(self, step)
            if signals and step < self.total:
                log(f"{self.name}: stopped by {', '.join(signal.Signals(n).name for n in signals)} "
                    f"after step {step} of {self.total}, checkpoint written; the same command goes "
                    "on from there")
                sys.exit(STOPPED)

    def note(self, **numbers):
        """Keep a step's numbers, of one micro batch each; None is not kept."""
        for name, value in numbers.items():
            if value is not None:
                value = value.detach() if torch.is_tensor(value) else value
                self.noted.setdefault(name, []).append(value)

    def check(self, step):
        """Stop where a noted number of the step is not finite, and keep the ids of its rows."""
        bad = [f"{name} {float(x)}" for name, numbers in self.noted.items() for x in numbers
               if not math.isfinite(x)]
        if bad := sum(gather_rows([(rank(), bad)]), []):
            path = self.dir / "bad_batch.jsonl"
            groups = sum(self.batch, []) if isinstance(self.batch, tuple) else self.batch  # of 07
            if rank() == 0:
                write_jsonl(path, [{"step": step, "ids": [g["id"] for g in groups], "bad": bad}])
            die(f"{self.name} step {step}: {', '.join(bad)} is not finite; the step's ids are "
                f"in {path}, the last checkpoint is kept")

    def due(self, step):
        """Whether to evaluate after a step: each --eval_every-th, and the last of each epoch."""
        epoch = [int(getattr(self.args, "epochs", 1) * s / self.total) for s in (step - 1, step)]
        due = step % self.args.eval_every == 0 or step == self.total or epoch[0] < epoch[1]
        return due and not self.check(step)  # before a broken model is evaluated

    def log(self, step, quiet=False, **values):
        """A line of metrics.jsonl, printed unless `quiet`: the values, and the step's noted numbers
        as means over micro batches and ranks. Every rank calls it. → all of them"""
        means = gather_rows([(rank(), {k: float(sum(x)) / len(x) for k, x in self.noted.items()})])
        result = {k: sum(m[k] for m in means) / len(means) for k in means[0]} | values
        values = {k: round(v, 6) if isinstance(v, float) else v for k, v in result.items()}
        if rank() == 0:
            self.metrics_file.write(json.dumps({"step": step, **values}) + "\n")
            self.metrics_file.flush()
            self.add_events and self.add_events(values, step)
            text = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                             for k, v in values.items())
            if not quiet:  # in a log file tqdm.write would repeat the bar
                (tqdm.write if sys.stderr.isatty() else log)(f"  {self.name} step {step}: {text}")
        return result

    def finish(self, run=None, **metrics):
        """Write manifest.json with the headline metrics and give the directory its final name.
        run: what 00 writes to run.json with it."""
        from_rank_0(partial(self.write_manifest, run, metrics))
        open_stages.remove(self)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log(f"{self.final}: done in {(time.time() - self.start) / 60:.1f} min  "
            + json.dumps(metrics))

    def write_manifest(self, run, metrics):
        self.metrics_file.close()
        card.write_card(self.dir, self.name, self.settings, run or self.args.run, metrics)
        files = sorted(p for p in self.dir.rglob("*") if p.is_file()  # events have the time
                       and not p.relative_to(self.dir).parts[0].startswith(("checkpoint", EVENTS)))
        outputs = {f"{self.name}/{p.relative_to(self.dir)}": sync(p) for p in files}
        outputs |= {"run.json": hash_text(canonical(run))} if run else {}
        code, before = code_hashes(self.script), (self.checkpoint or {}).get("code", {})
        other = {f: v for f, v in before.items() if code.get(f) != v}
        times = self.start, time.time()
        start, end = (time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(t)) for t in times)
        manifest = {
            "stage": self.name, "script": self.script, "command": shlex.join(sys.argv),
            **self.settings, "start": start, "end": end,
            "seconds": round(times[1] - times[0], 1),
            "git_commit": git("rev-parse", "HEAD").strip(),
            "git_dirty": bool(git("status", "--porcelain", "--untracked-files=no")), "code": code,
            **({"code_before_resume": other} if other else {}),  # of the steps to the checkpoint
            "packages": {p: version(p) for p in ("torch", "transformers", "deepspeed", "tokenizers",
                                                 "numpy")},
            "python": platform.python_version(),
            "hardware": torch.cuda.get_device_name() if device().type == "cuda" else
            f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
            "outputs": outputs, "metrics": json.loads(json.dumps(metrics)),
            **({"run": run} if run else {})}
        write_text(self.dir / "manifest.json",
                   canonical({**manifest, "digest": digest_of(manifest)}))
        promote(self.dir)


def clean_up():
    """After an error: remove a partial directory that holds nothing worth keeping, and a run
    directory that holds nothing else."""
    worth = ("checkpoint_*", "bad_batch.jsonl", "manifest.json")
    if rank() == 0 and not any(list(s.dir.glob(name)) for s in open_stages for name in worth):
        for stage in open_stages:
            shutil.rmtree(stage.dir, ignore_errors=True)
            if stage.out.is_dir() and set(os.listdir(stage.out)) <= {
                    ".lock", ".report_lock", ".run_all.lock", "commands.log"}:
                shutil.rmtree(stage.out)


launch, save_checkpoint = partial(base.launch, clean_up=clean_up), checkpoint.save
side_by_side = partial(forks.side_by_side, launch=launch)


def git(*words):
    """What git prints; nothing where there is none."""
    try:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True).stdout
    except OSError:
        return ""


def promote(directory):
    """Give a complete partial directory its final name. The old one stays until then: its manifest
    goes first, so that no moment has a half of it that counts as complete."""
    if not (directory / "manifest.json").exists():
        return
    final = directory.with_name(directory.name.removesuffix(".partial"))
    final.is_symlink() and final.unlink()  # of a replay, to the run that it replays
    if run := read_json(directory / "manifest.json").get("run"):
        write_text(directory.parent / "run.json", canonical(run))
    for folder in (*directory.glob("checkpoint*"), final):
        (folder / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    directory.rename(final)


def differences(old, new, but=()):
    """What two `settings` differ in, for people: "--lr (0.001 then, 0.1 now)"."""
    out = []
    for key, b in sorted(new.items()):
        a = old.get(key)
        if isinstance(b, dict):
            hyper = key == "hyperparameters"
            out += [f"--{k} ({a.get(k)} then, {b.get(k)} now)" if hyper else f"{k} (changed)"
                    for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)
                    and k not in ("save_every", *but)]
        elif a != b:
            out.append(f"{key.replace('_', ' ')} ({a} then, {b} now)")
    return out


def ask_to_stop(number, frame):
    """Signal handler while training: the step in hand is finished first; Ctrl-C again is not."""
    if number == signal.SIGINT and asked_to_stop:
        raise KeyboardInterrupt
    asked_to_stop[number] = True
