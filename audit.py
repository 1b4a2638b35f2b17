"""The record of a run: hyperparameters from the command line, stage directories, manifests, checkpoints, verification.

A stage writes into `<out>/<name>.partial`; `finish_stage` writes manifest.json last and renames the directory, so a
directory with its final name is complete. Training stages keep checkpoints in the partial directory; the same command
goes on from the newest one. README, "Auditing a run" and "When a run is interrupted", say what is kept and checked.

    python common.py verify DIR              every hash of a run, from the last stage back to the data
    python common.py replay DIR STAGE        a recorded stage again, elsewhere, compared hash by hash
    python common.py changed DIR             finished stages whose inputs are no longer those they were made from
"""
import argparse
import fcntl
import functools
import hashlib
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy
import torch
import torch.distributed as dist

from common import barrier, device, die, gather_rows, log, rank, world_size

HERE = Path(__file__).resolve().parent
CHOICES = {"preset": ("paper", "toy"), "zero": (0, 1, 2, 3), "precision": ("fp32", "bf16", "autocast"),
           "layout": ("auto", "shared", "separate")}
STOPPED = 75  # exit code of a stage that a signal stopped after a checkpoint (EX_TEMPFAIL: try again)
ROOT_FILES = {"run.json", "commands.log", ".lock", ".run_all.lock", ".hashes.json"}  # no stage directory's own
STAGE_DIR = re.compile(r"(0[01389]_\w+|0[24567]_\w+/[^/]+)/")
ASIDE = re.compile(r"\.(partial|stale-\d+)(/|$)")
locks, asked_to_stop, open_stages, aside = {}, {}, [], []


# ---------------------------------------------------------------- command line

def parse_args(doc, hparams, add_flags=None, argv=None, reads_run=True):
    """Resolve a stage's hyperparameters: a flag if given, else the column of the run's preset.

    `hparams`: {name: (paper value, toy value, help)}. `add_flags(parser)` adds the stage's own flags.
    Returns a namespace that also holds `run` (the contents of run.json) and `hparams` (resolved values).
    `--dry_run` prints the resolved values as JSON and exits.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: die(f"{message} ({parser.prog} --help lists the flags)")
    flag = parser.add_argument_group("run").add_argument
    flag("--out", default="out", help="run directory (default: out)")
    flag("--preset", choices=CHOICES["preset"], help="column of the table below (default: the run's; toy)")
    flag("--seed", type=int, help="random seed (default: the run's; 0)")
    flag("--limit", type=int, help="smoke run: at most N optimiser or roll-out steps in every loop, 64*N rows "
                                  "to train on and 16*N to evaluate")
    flag("--layout", choices=CHOICES["layout"], default="auto",
         help="prompt once per group (shared), one row per response (separate), or probe the model (auto)")
    flag("--dry_run", action="store_true", help="print the resolved hyperparameters and stop")
    flag("--restart", action="store_true", help="begin anew; an unfinished directory is kept aside, not continued")
    flag("--deterministic", action="store_true",
         help="on a GPU: only kernels that give the same bits every time; slower, an operation without one is an error")
    flag("--debug", action="store_true", help="show the traceback of an error")
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
    args.run = read_json(run_file) if run_file.exists() and reads_run else {}
    if reads_run and not args.run and not args.dry_run:
        die(f"{run_file} is missing: run `python 00_data.py --out {args.out}` first")
    for name, default in (("preset", "toy"), ("seed", 0), ("limit", None)):
        if getattr(args, name) is None:
            setattr(args, name, args.run.get(name, default))
    column = CHOICES["preset"].index(args.preset)
    for name, row in hparams.items():
        if getattr(args, name) is None:
            setattr(args, name, row[column])
    if args.limit is not None and args.limit < 1:
        die(f"--limit must be positive, not {args.limit}")
    if args.limit and "save_every" in hparams:
        args.save_every = min(args.save_every, max(1, args.limit // 2))  # a smoke run tries checkpoints too
    for name, row in hparams.items():
        value = getattr(args, name)
        if isinstance(value, float) and not math.isfinite(value):
            die(f"--{name} must be a finite number")
        if type(row[0]) is int and value < (row[column] > 0 and name != "freeze_prototypes"):
            die(f"--{name} must be positive, not {value}")
    args.hparams = {name: getattr(args, name) for name in hparams}
    if args.dry_run:
        log(json.dumps({"stage": Path(sys.argv[0]).stem, "preset": args.preset, "seed": args.seed, **args.hparams}))
        sys.exit(0)
    return args


def run(main):
    """Run a stage's `main`. Whatever goes wrong is one line, printed by one rank, and exit code 2; --debug shows the
    traceback as well."""
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()  # or a rank that leaves early may abort
    except SystemExit as stop:
        if stop.code == 2:
            clean_up()
        raise
    except KeyboardInterrupt:
        if rank() == 0:
            print("interrupted: the same command goes on from what is written", file=sys.stderr, flush=True)
        sys.exit(130)
    except Exception as error:
        clean_up()
        if "--debug" in sys.argv:
            raise
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        if rank() > 0:
            time.sleep(5)  # rank 0 says it, if it failed as well: the launcher ends this process before it speaks
        text = (str(error).strip().splitlines() or [""])[0][:300]
        if isinstance(error, OSError) and error.strerror:
            text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        elif isinstance(error, torch.OutOfMemoryError):
            text = "out of memory: lower --micro_batch_size, or use more processes or a higher --zero"
        else:
            text = f"{type(error).__name__}: {text}"
        print(f"error: {Path(sys.argv[0]).name}: {text} (--debug shows the traceback)", file=sys.stderr, flush=True)
        sys.exit(2)


def clean_up():
    """Take a partial directory that holds nothing worth keeping away again; what was put aside for it comes back."""
    if rank() > 0 or any(list(s.dir.glob(kept)) for s in open_stages
                         for kept in ("checkpoint_*", "bad_batch.jsonl", "manifest.json")):
        return
    for stage in open_stages:
        shutil.rmtree(stage.dir, ignore_errors=True)
    for old, final in aside:
        if old.exists() and not final.exists():
            old.rename(final)


def from_rank_0(work):
    """work() on rank 0, its result on every rank; if it stops the run there, every rank stops."""
    box = [None, None]
    if rank() == 0:
        try:
            box[0] = work()
        except SystemExit as stop:
            box[1] = stop.code
        except OSError as error:
            if world_size() == 1:
                raise
            print(f"error: {error.strerror}: {error.filename}", file=sys.stderr, flush=True)
            box[1] = 2
    if dist.is_initialized() and world_size() > 1:
        dist.broadcast_object_list(box)
    if box[1] is not None:
        sys.exit(box[1])
    return box[0]


# ---------------------------------------------------------------- files

def read_json(path):
    """The contents of a JSON file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        die(f"{path} is damaged ({error}): run the stage that wrote it again")


def read_jsonl(path):
    """All rows of a JSON-lines file."""
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                rows.append(json.loads(line))
    except FileNotFoundError:
        die(f"{path} is missing")
    except ValueError as error:
        die(f"{path}:{len(rows) + 1}: not JSON in UTF-8 ({error})")
    return rows


def write_text(path, text):
    """Write a file under a temporary name, flush it to the disk and rename it: it is there whole or not at all."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_jsonl(path, rows):
    """Write rows as JSON lines."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def sha256(path):
    """Hex digest of a file, streamed; a progress bar for those of a gigabyte and more."""
    from tqdm import tqdm
    size, digest = os.path.getsize(path), hashlib.sha256()
    with open(path, "rb") as file, tqdm(total=size, desc=f"hashing {Path(path).name}", unit="B", unit_scale=True,
                                        leave=False, disable=size < 2 ** 30 or rank() > 0) as bar:
        while chunk := file.read(2 ** 22):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def cached_sha256(out, paths, known={}):
    """{path: sha256} of files of the run directory; a file whose size, mtime and inode are as when it was last hashed
    is not read again, nor is one that is `known`. Only the pipeline uses this: `verify` reads every byte."""
    file = Path(out) / ".hashes.json"
    try:
        cache = json.loads(file.read_text())
    except (OSError, ValueError):
        cache = {}
    before, hashes = dict(cache), {}
    for path in paths:
        try:
            s = os.stat(Path(out) / path)
        except FileNotFoundError:
            continue
        if cache.get(path, [None])[:3] != [s.st_size, s.st_mtime_ns, s.st_ino]:
            cache[path] = [s.st_size, s.st_mtime_ns, s.st_ino, known.get(path) or sha256(Path(out) / path)]
        hashes[path] = cache[path][3]
    if cache != before and Path(out) in locks:
        write_text(file, json.dumps(cache))
    return hashes


def finished(out):
    """Names of the finished stages, every one with its manifest."""
    out = Path(out)
    names = [str(p.parent.relative_to(out)) for pattern in ("*/manifest.json", "*/*/manifest.json")
             for p in sorted(out.glob(pattern))]
    return [n for n in names if not ASIDE.search(n)]


def put_aside(path):
    """Rename a directory to NAME.stale-N, the first N that is free."""
    n = 1
    while (stale := path.with_name(f"{path.name}.stale-{n}")).exists():
        n += 1
    path.rename(stale)
    aside.append((stale, path))
    return stale


def lock(out):
    """Hold the run directory until the end of this process, however it ends."""
    if out in locks:
        return
    file = open(Path(out) / ".lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        die(f"{out} is in use by process {file.read().strip()}: wait for it, or give another --out")
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    locks[out] = file


# ---------------------------------------------------------------- inputs

def require(args, name, command):
    """Directory of a finished stage of this run; one line naming the command when it is not there, is not what its
    manifest says, or was made from other inputs than those that are here now."""
    path, mend = Path(args.out) / name, f"run `{command} --out {args.out}` first"
    if not (path / "manifest.json").exists():
        die(f"{path} is missing or unfinished: {mend}")
    manifest = read_json(path / "manifest.json")
    if manifest.get("stage") != name:
        die(f"{path} is a copy of {manifest.get('stage')}: {mend}")
    if other := from_rank_0(lambda: other_inputs(args.out, manifest)):
        die(f"{path} was made from another {other[0]} than is here now: {mend}")
    return path


def other_inputs(out, manifest):
    """Inputs of a manifest that are missing now or have another hash."""
    now = cached_sha256(out, manifest["inputs"])
    return [path for path, value in manifest["inputs"].items() if now.get(path) != value]


def other_input(out, name):
    """One input of the finished stage `name` that is no longer the one it was made from, or None; its own manifest if
    that cannot be read."""
    path = out / name / "manifest.json"
    try:
        return next(iter(other_inputs(out, json.loads(path.read_text(encoding="utf-8")))), None)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError):
        return f"{name}/manifest.json"


def input_hashes(out, inputs):
    """{path: sha256} of the inputs: files, or stage directories (without their figures and curves)."""
    paths = ["run.json"] if inputs else []
    for name in inputs:
        folder = next((p for p in [out / name, *(out / name).parents] if (p / "manifest.json").exists()), None)
        if folder is None:
            die(f"{out / name} is missing: run the stage that makes it again")
        paths += [path for path in read_json(folder / "manifest.json")["outputs"] if inside(path) and (path == name or (
            path.startswith(f"{name}/") and not path.endswith((".png", "metrics.jsonl"))))]
    hashes = cached_sha256(out, paths)
    if missing := [path for path in paths if path not in hashes]:
        die(f"{out / missing[0]} is missing: run {missing[0].split('/')[0]} again")
    return hashes


def is_name(name):
    """A name that a directory of a stage with several models may have."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*", name)) and not ASIDE.search(name) and name != "figures"


def inside(path):
    """A recorded path stays in the run directory."""
    return not Path(path).is_absolute() and ".." not in Path(path).parts


# ---------------------------------------------------------------- start, go on, stop, finish

def start_stage(args, name, inputs=()):
    """Open `<out>/<name>.partial`, or go on with it where a checkpoint of the same command is kept there.

    `inputs`: the files or stage directories that the stage reads, relative to `--out`. Stops when another process
    holds the run directory, and when the checkpoint was made with other hyperparameters, inputs or world size.
    """
    out = Path(args.out)
    stage = SimpleNamespace(args=args, name=name, final=out / name, start=time.time(), dir=out / f"{name}.partial",
                            engines={}, steps=None, metrics_file=None)

    def prepare():
        out.mkdir(parents=True, exist_ok=True)
        lock(out)
        if args.restart and stage.dir.exists():
            log(f"--restart: the unfinished directory is kept as {put_aside(stage.dir)}")
        if (stage.dir / "manifest.json").exists():
            promote(stage.dir)  # the process was killed just before it did
        stage.inputs = input_hashes(out, inputs)
        stage.settings = settings(stage)
        checkpoint = newest_checkpoint(stage)
        if checkpoint:
            different = differences(checkpoint["settings"], stage.settings)
            if different:
                die(f"{stage.dir} holds step {checkpoint['step']} of a command that differs in {'; '.join(different)}: "
                    "give the same again, or --restart to begin anew")
        else:
            shutil.rmtree(stage.dir, ignore_errors=True)
            stage.dir.mkdir(parents=True)
        if other := other_input(out, name):
            log(f"{stage.final} was made from another {other}: kept as {put_aside(stage.final)} until the new one is "
                "complete")
        return checkpoint, stage.inputs, stage.settings

    if any_rank(bool(asked_to_stop)):  # in the last step of the launch's model before
        log("stopped by a signal; the same command goes on from there")
        sys.exit(STOPPED)
    stage.checkpoint, stage.inputs, stage.settings = from_rank_0(prepare)
    open_stages.append(stage)
    if rank() == 0:
        stage.metrics_file = open(stage.dir / "metrics.jsonl", "a+", encoding="utf-8")
        stage.metrics_file.truncate(stage.checkpoint["metrics_bytes"] if stage.checkpoint else 0)
        stage.metrics_file.seek(0, os.SEEK_END)
        for path in stage.dir.iterdir():  # what the killed process wrote after the checkpoint
            if path.name not in ("metrics.jsonl", "samples.jsonl", (stage.checkpoint or {}).get("folder")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    barrier()
    return stage


def settings(stage):
    """What a checkpoint must have in common with the command that goes on from it."""
    args = stage.args
    return json.loads(json.dumps({
        "preset": args.preset, "seed": args.seed, "limit": args.limit, "layout": args.layout,
        "deterministic": args.deterministic, "world size": world_size(), "inputs": stage.inputs,
        **{f"--{k}": v for k, v in args.hparams.items() if k != "save_every"}}))


def differences(old, new):
    """What two `settings` differ in, for people: "--lr 0.001 then, 0.1 now"."""
    out = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += [f"{path} (changed)" for path in sorted(a.keys() | b.keys()) if a.get(path) != b.get(path)]
        elif a != b:
            out.append(f"{key} ({a} then, {b} now)")
    return out


def newest_checkpoint(stage):
    """checkpoint.json of the newest complete checkpoint of a partial directory, or None."""
    found = sorted(stage.dir.glob("checkpoint_*/checkpoint.json"), key=lambda p: int(p.parent.name.split("_")[1]))
    return {**read_json(found[-1]), "folder": found[-1].parent.name} if found else None


def resume(stage, engines, steps):
    """Call before the training loop of `steps` steps, with its engines by name. → (steps done, the state given to
    `end_step` then): 0 and {} for a new run, else where the checkpoint was made, engines and random states as there.

    DeepSpeed's checkpoints are pickles: they are loaded only if every file has the hash that this stage wrote down.
    """
    stage.engines, stage.steps = engines, steps
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask_to_stop)
    if not stage.checkpoint:
        return 0, {}
    folder, made = stage.dir / stage.checkpoint["folder"], stage.checkpoint
    bad = gather_rows([(f, f) for f in sorted(made["files"])[rank()::world_size()]
                       if not inside(f) or not (folder / f).is_file() or sha256(folder / f) != made["files"][f]])
    if bad:
        die(f"{folder / bad[0]} is damaged: --restart begins anew")
    for name, engine in engines.items():
        engine.load_checkpoint(str(folder), tag=name)
    states = read_json(folder / f"random_{rank()}.json")
    kind, numbers, gauss = states["python"]
    random.setstate((kind, tuple(numbers), gauss))
    name, keys, *rest = states["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8))
    log(f"{stage.name}: goes on after step {made['step']} of {steps}")
    return made["step"], made["state"]


def ask_to_stop(number, frame):
    """Signal handler while training: the step in hand is finished first. A second Ctrl-C does not wait."""
    if number == signal.SIGINT and signal.SIGINT in asked_to_stop:
        raise KeyboardInterrupt
    asked_to_stop[number] = True


def any_rank(flag):
    """True on every rank if it is true on one."""
    if not dist.is_initialized() or world_size() == 1:
        return flag
    flags = torch.tensor([float(flag)], device=device())
    dist.all_reduce(flags)
    return flags.item() > 0


def end_step(stage, step, groups, state=None, **numbers):
    """Call after every optimiser step: stops on a non-finite number, saves a checkpoint every --save_every steps, and
    after a signal saves one and stops with exit code 75.

    groups: the step's global batch, whose ids are reported; state: what `resume` should give back (JSON); numbers:
    loss, gradient norm, rewards ... of this rank.
    """
    numbers = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in numbers.items()}
    if any_rank(not all(map(math.isfinite, numbers.values()))):
        path = stage.dir / "bad_batch.jsonl"
        if rank() == 0:
            write_jsonl(path, [{"step": step, "ids": [g["id"] for g in groups],
                                **{k: str(v) for k, v in numbers.items()}}])
        bad = [f"{k} {v}" for k, v in numbers.items() if not math.isfinite(v)] or ["a number on another process"]
        die(f"{stage.name} step {step}: {', '.join(bad)} is not finite; the step's ids are in {path}, "
            "the last checkpoint is kept")
    stop = any_rank(bool(asked_to_stop))
    if step < stage.steps and (stop or step % stage.args.save_every == 0):
        save_checkpoint(stage, step, state or {})
    if stop and step < stage.steps:
        log(f"{stage.name}: stopped by {', '.join(signal.Signals(n).name for n in asked_to_stop) or 'a signal'} after "
            f"step {step} of {stage.steps}, checkpoint written; the same command goes on from there")
        sys.exit(STOPPED)


def save_checkpoint(stage, step, state):
    """Engines, random states of every rank, `state` and the metrics' length, complete under its name or not there;
    the one before is removed after that."""
    folder = stage.dir / "checkpoint.tmp"
    if rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    barrier()
    for name, engine in stage.engines.items():
        engine.save_checkpoint(str(folder), tag=name, save_latest=False)
    name, keys, *rest = numpy.random.get_state()
    write_text(folder / f"random_{rank()}.json", json.dumps({
        "python": random.getstate(), "numpy": [name, keys.tolist(), *rest], "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None}))
    barrier()
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    # every rank reads its share back: a checkpoint of a large model is read once
    hashes = gather_rows([(f, (f, flushed_sha256(folder / f))) for f in files[rank()::world_size()]])
    if rank() == 0:
        stage.metrics_file.flush()
        os.fsync(stage.metrics_file.fileno())
        write_text(folder / "checkpoint.json", json.dumps({
            "step": step, "settings": stage.settings, "metrics_bytes": stage.metrics_file.tell(), "state": state,
            "code": code_hashes(stage), "files": dict(hashes)}))
        folder.rename(stage.dir / f"checkpoint_{step}")
        for old in stage.dir.glob("checkpoint_*"):
            if old.name != f"checkpoint_{step}":
                shutil.rmtree(old)
    barrier()


def flushed_sha256(path):
    """Hash of a file that is on the disk, not in the cache only, when this returns."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return sha256(path)


def begin_launch(args, folder):
    """For 02, 04 and 05, which train several models: a launch that had ended trains all anew, so its figures step
    aside; models finished after that are kept if this launch is cut short."""
    figures = Path(args.out) / folder / "figures"

    def prepare():
        lock(Path(args.out))
        if (figures / "manifest.json").exists():
            put_aside(figures)
    from_rank_0(prepare)


def kept(args, name, inputs):
    """True when a launch of several models was cut short after it finished `name` from these hyperparameters and
    inputs."""
    manifest, partial = Path(args.out) / name / "manifest.json", Path(args.out) / f"{name}.partial"
    if from_rank_0((partial / "manifest.json").exists):
        from_rank_0(lambda: promote(partial))
    if not manifest.exists():
        return False
    ended = [p.stat().st_mtime_ns for p in manifest.parent.parent.glob("figures.stale-*/manifest.json")]
    made = read_json(manifest)
    stage = SimpleNamespace(args=args, inputs=from_rank_0(lambda: input_hashes(Path(args.out), inputs)))
    was = SimpleNamespace(args=SimpleNamespace(**made, hparams=made["hyperparameters"]), inputs=made["inputs"])
    same = manifest.stat().st_mtime_ns > max(ended, default=0) and made["world_size"] == world_size() and \
        settings(stage) == settings(was)
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


def code_hashes(stage):
    """{file: sha256} of the stage's script and the project's files that it imports: 05 and 07 use 04's losses, for
    example."""
    files, todo = {}, [f"{stage.name.split('/')[0]}.py"]
    while todo:
        if (path := HERE / todo.pop()).is_file() and path.name not in files:
            files[path.name] = sha256(path)
            todo += [f"{name}.py" for name in re.findall(r'(?:^ *(?:import|from) |import_module\(")(\w+)',
                                                        path.read_text(encoding="utf-8"), re.MULTILINE)]
    return dict(sorted(files.items()))


def canonical(manifest):
    """The manifest file's text for these values; `digest` is the hash of the text without it."""
    return json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"


def digest_of(manifest):
    return hashlib.sha256(canonical({k: v for k, v in manifest.items() if k != "digest"}).encode()).hexdigest()


def finish_stage(stage, metrics, **more):
    """Write manifest.json and give the directory its final name (rank 0). `metrics`: the headline numbers; `more`:
    further entries of the manifest."""
    args, out = stage.args, Path(stage.args.out)

    def write():
        stage.metrics_file.close()

        def git(*words):
            try:
                return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True).stdout
            except OSError:
                return ""  # no git here

        files = sorted(p for p in stage.dir.rglob("*") if p.is_file()
                       and not p.relative_to(stage.dir).parts[0].startswith("checkpoint"))
        code, before = code_hashes(stage), (stage.checkpoint or {}).get("code", {})
        manifest = {
            "stage": stage.name, "command": shlex.join(sys.argv), "preset": args.preset, "seed": args.seed,
            "limit": args.limit, "layout": args.layout, "deterministic": args.deterministic,
            "hyperparameters": args.hparams,
            "start": datetime.fromtimestamp(stage.start, timezone.utc).isoformat(timespec="seconds"),
            "end": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.time() - stage.start, 1),
            "git_commit": git("rev-parse", "HEAD").strip(),
            "git_dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
            "code": code,
            "packages": {p: version(p) for p in ("torch", "transformers", "deepspeed", "tokenizers", "numpy")},
            "python": platform.python_version(),
            "hardware": torch.cuda.get_device_name() if device().type == "cuda" else
            f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
            "world_size": world_size(),
            "inputs": stage.inputs,
            "outputs": {f"{stage.name}/{p.relative_to(stage.dir)}": flushed_sha256(p) for p in files},
            "metrics": json.loads(json.dumps(metrics)), **more,
        }
        if "run" in more:  # `promote` writes it
            manifest["outputs"]["run.json"] = hashlib.sha256(canonical(more["run"]).encode()).hexdigest()
        if changed := {f: v for f, v in before.items() if f in code and code[f] != v}:
            manifest["code_before_resume"] = changed  # the steps up to the last checkpoint were made by this
        write_text(stage.dir / "manifest.json", canonical({**manifest, "digest": digest_of(manifest)}))
        promote(stage.dir)
        cached_sha256(out, manifest["outputs"], manifest["outputs"])

    from_rank_0(write)
    open_stages.clear(), aside.clear()
    signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.default_int_handler)
    log(f"{stage.final}: done in {(time.time() - stage.start) / 60:.1f} min  " + json.dumps(metrics))


def promote(partial):
    """Give a complete partial directory its final name. The old directory of that name stays until then; what had been
    put aside for it goes."""
    final = partial.with_name(partial.name.removesuffix(".partial"))
    if run := read_json(partial / "manifest.json").get("run"):
        write_text(partial.parent / "run.json", canonical(run))
    for checkpoint in partial.glob("checkpoint*"):
        shutil.rmtree(checkpoint)
    if final.exists():
        put_aside(final)
    partial.rename(final)
    for old in final.parent.glob(f"{final.name}.stale-*"):
        old.unlink() if old.is_symlink() else shutil.rmtree(old)  # a replay has links


# ---------------------------------------------------------------- verify, replay, changed

def changed(out):
    """[(stage, path)] of the finished stages with an input that is no longer the one they were made from. Also gives
    a directory its final name where a process was killed just before it did."""
    for pattern in ("*.partial/manifest.json", "*/*.partial/manifest.json"):
        for manifest in out.glob(pattern):
            promote(manifest.parent)

    def by_hand(name):  # a model beside those of 04's and 05's standard launch: the driver cannot make it again
        figures = read_manifest(out, f"{name.split('/')[0]}/figures")
        return figures and name[:2] in ("02", "04", "05") and not name.endswith("/figures") and \
            not any(path.startswith(f"{name}/") for path in figures["inputs"])
    return [(name, other) for name in finished(out) if not by_hand(name) and (other := other_input(out, name))]


def in_order(manifests):
    """Stage names, each after the stages whose outputs it reads; the same order wherever it is computed."""
    maker = {path: name for name, m in manifests.items() for path in m["outputs"]}

    @functools.cache
    def depth(name):
        makers = {maker[p] for p in manifests[name]["inputs"] if p in maker} - {name}
        return 1 + max(map(depth, makers), default=0)
    return sorted(manifests, key=lambda name: (depth(name), name))


def head(manifests):
    """One hash over all manifests in order, without what may differ between equal runs: command line with its paths,
    times, the state of git, the hardware's name. The report is a view of the run, not a part of it."""
    left_out = {"command", "start", "end", "seconds", "git_commit", "git_dirty", "hardware", "digest"}
    chain = hashlib.sha256()
    for name in in_order({k: m for k, m in manifests.items() if k != "09_report"}):
        chain.update(canonical({k: v for k, v in manifests[name].items() if k not in left_out}).encode())
    return chain.hexdigest()


def read_manifest(out, name):
    """A stage's manifest, or None if it is not, byte for byte, what `finish_stage` wrote for this directory."""
    try:
        text = (out / name / "manifest.json").read_text(encoding="utf-8")
        manifest = json.loads(text)
        ok = text == canonical(manifest) and manifest["digest"] == digest_of(manifest) and manifest["stage"] == name \
            and all(map(inside, [*manifest["inputs"], *manifest["outputs"]]))
        return manifest if ok else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def verify(out):
    """Check a run directory from its last stage back to the data; → True if all holds.

    Every output has its recorded hash, every input is the output of a stage with that hash, every file of a stage
    directory is recorded, every script is that of this checkout. Prints one line a stage, names each file at fault.
    """
    if not finished(out):
        die(f"{out} holds no finished stage")
    manifests = {name: read_manifest(out, name) for name in finished(out)}
    found = {name: [] for name in manifests}                      # what is wrong, by stage
    broken = [name for name, manifest in manifests.items() if manifest is None]
    for name in broken:
        found[name].append(f"changed: {name}/manifest.json")
    good = {name: m for name, m in manifests.items() if m}
    recorded = {path: (name, value) for name, m in good.items() for path, value in m["outputs"].items()}
    actual = {path: sha256(out / path) for path in recorded if (out / path).is_file()}
    wrong = {path: actual.get(path) for path, (_, value) in recorded.items() if actual.get(path) != value}
    for path, value in wrong.items():
        name, expected = recorded[path]
        partner = next((p for p in wrong if recorded[p][1] == value and wrong[p] == expected), None)
        found[name].append(f"missing: {path}" if value is None else
                           f"swapped: {path} and {partner}" if partner else f"changed: {path}")
    for file in sorted(p for p in out.rglob("*") if p.is_file() or p.is_symlink()):
        path = str(file.relative_to(out))
        if path in recorded or path in ROOT_FILES or ASIDE.search(path):
            continue
        folder = (STAGE_DIR.match(path) or ["", ""])[1]
        if folder in manifests or not folder:
            if path != f"{folder}/manifest.json" and folder not in broken:
                found.setdefault(folder or ".", []).append(f"extra: {path}")
        elif f"missing: {folder}/manifest.json" not in found.setdefault(folder, []):
            found[folder].append(f"missing: {folder}/manifest.json")
    for name, manifest in good.items():
        for path, value in manifest["inputs"].items():
            folder = (STAGE_DIR.match(path) or ["", "00_data"])[1]
            if path in recorded and recorded[path][1] != value:
                found[name].append(f"made from another {path}")
            elif path not in recorded and folder in good:
                found[name].append(f"made from {path}, which {folder} does not have")
            elif path not in recorded and folder not in found:
                found[folder] = [f"missing: {folder}, which {name} was made from"]
        for file, value in manifest["code"].items():
            if not (HERE / file).is_file() or sha256(HERE / file) != value:
                commit = (manifest["git_commit"][:12] or "unknown") + ", uncommitted changes" * manifest["git_dirty"]
                found[name].append(f"made by other code: {file} of commit {commit}")
    order = in_order(good)[::-1]
    for name in order + [n for n in found if n not in order]:
        if found[name]:
            print(f"BAD  {name}  " + "; ".join(found[name]))
        else:
            resumed = "code_before_resume" in good[name]
            print(f"ok   {name}  {len(good[name]['outputs'])} files" + "  (some steps by other code)" * resumed)
    aside = sorted({str(p.relative_to(out)) for pattern in ("*", "*/*") for p in out.glob(pattern)
                    if re.search(r"\.(partial|stale-\d+)$", p.name)})
    if aside:
        print(f"note: not part of the run: {', '.join(aside)}")
    bad = sum(map(bool, found.values()))
    print(f"{bad} of {len(found)} stages do not hold" if bad else f"all {len(found)} stages hold")
    print(f"head {head(good)}")
    return not bad


def replay(out, stage):
    """Run a recorded stage again from its recorded inputs in a scratch directory; → True if every output has the
    recorded hash (on a CPU, with as many processes, it should)."""
    names = [n for n in finished(out) if n == stage or n.startswith(f"{stage}/")]
    if not names:
        die(f"{out} has no finished stage {stage} (they are: {', '.join(finished(out))})")
    manifests = {n: read_json(out / n / "manifest.json") for n in names}
    for name, manifest in manifests.items():
        if other := other_inputs(out, manifest):
            die(f"{out}/{name} was made from another {other[0]} than is here now: nothing to replay it from")
    scratch = Path(tempfile.mkdtemp(prefix="replay-"))
    read = {STAGE_DIR.match(path)[1] for m in manifests.values() for path in m["inputs"] if STAGE_DIR.match(path)}
    for name in finished(out):
        if name not in names and (name in read or not name.startswith("06_ppo/")):  # 08 takes every policy there is
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).symlink_to((out / name).resolve())
    if (out / "run.json").exists() and "00_data" not in names:
        shutil.copy(out / "run.json", scratch / "run.json")
    commands = {}
    for name, manifest in ((n, manifests[n]) for n in in_order(manifests)):
        flags = [word for word in shlex.split(manifest["command"])[1:]
                 if not word.startswith(("--local_rank", "--out="))]
        if "--out" in flags:
            del flags[flags.index("--out"):flags.index("--out") + 2]
        commands[(manifest["world_size"], *flags)] = name.split("/")[0]
    for (processes, *flags), script in commands.items():
        launcher = ["deepspeed", "--num_gpus", str(processes)] if processes > 1 else [sys.executable]
        command = [*launcher, str(HERE / f"{script}.py"), *flags, "--out", str(scratch)]
        print(shlex.join(command), flush=True)
        if subprocess.run(command).returncode:
            die(f"the command failed; {scratch} is kept")
    same = True
    for name, manifest in manifests.items():
        path = scratch / name / "manifest.json"
        new = read_json(path)["outputs"] if path.exists() else {}
        old = manifest["outputs"]
        different = [p for p in sorted(old.keys() | new.keys()) if old.get(p) != new.get(p)]
        print(f"BAD  {name}  differs: {', '.join(different)}" if different else f"ok   {name}  {len(old)} files equal")
        same = same and not different
    if same:
        shutil.rmtree(scratch)
    else:
        print(f"the replay is kept in {scratch}")
    return same


def command_line(argv):
    """verify DIR | replay DIR STAGE | changed DIR"""
    usage = "usage: python common.py verify DIR | replay DIR STAGE | changed DIR"
    if len(argv) < 2 or argv[0] not in ("verify", "replay", "changed") or len(argv) != 2 + (argv[0] == "replay"):
        die(usage)
    out = Path(argv[1])
    if not out.is_dir():
        die(f"{out} is no directory")
    if argv[0] == "changed":
        lock(out)
        for name, path in changed(out):
            print(name, path)
    elif not (verify(out) if argv[0] == "verify" else replay(out, argv[2].strip("/"))):
        sys.exit(1)


# the colours of Okabe and Ito, which colour-blind people can tell apart; yellow is left out, too pale for lines
OKABE_ITO = ["#000000", "#e69f00", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#999999"]


def pyplot():
    """matplotlib without a display, imported late, in the style of all figures."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({
        "figure.dpi": 110, "axes.grid": True, "grid.alpha": 0.3, "savefig.bbox": "tight",
        "axes.prop_cycle": matplotlib.cycler(color=OKABE_ITO)})
    return plt
