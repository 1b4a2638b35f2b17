"""What `bash run_all.sh` does in its environment: a run's stages, one after another.

Where a stage needs no launcher (no GPU, neither --gpus nor --hostfile), it is a fork of this
process, which has imported what stages import: that takes most of a small stage's time. The command
that is printed and logged does the same by hand. lab/experiments.py says what is to do.
"""
import contextlib
import os
import shlex
import signal
import socket
import sys
import threading
import time
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402  (the project's root is on the path now)

import torch  # noqa: E402

from lab import experiments, status, verify  # noqa: E402
from lab.base import (  # noqa: E402
    HERE, STOPPED, code_hashes, die, lock, locks, log, replace_attention)
from lab.forks import fork  # noqa: E402

LOCK = ".run_all.lock"
# a stage's own processes, by their command: not DeepSpeed's launcher, which kills them after 30 s
STAGE = r"^[^ ]*python[0-9.]* (-u )?[^ -][^ ]*\.py( |$)"
SIGNALS = (signal.SIGTERM, signal.SIGINT)
asked, child = [], None  # signals that came, and the stage at work


def warm(*scripts):
    """Import what all stages and these scripts import, and hash it: Python code that is changed
    while a run is at work is not what its stages run."""
    import deepspeed  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    replace_attention()
    for name in [*(path.name for path in HERE.glob("0*.py")), *scripts]:
        experiments.stage_of(name), code_hashes(name)


def begin(words):
    """Start a command in a process group of its own, so that Ctrl-C reaches it by `hand_on` only;
    one of plain `python` is a fork that goes on with its script, where this process has no threads
    and no CUDA, under Linux. → its process id"""
    script = os.path.relpath(words[1], HERE)
    forked = words[0] == "python" and sys.platform == "linux" and not torch.cuda.is_available()
    if forked:
        warm(script)
        forked = threading.active_count() == 1
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until `child` is known, see `go`

    def work():
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        for name in [key for key in locks if key[1] == LOCK]:  # the driver's, as long as it lives
            locks.pop(name).close()
        sys.argv = words[1:] if forked else words
        common.launch(experiments.stage_of(script).main if forked else
                      lambda: os.execvp(words[0], words))
    return fork(work)


def stopped():
    """End as a stage does that a signal has stopped, with the command that goes on."""
    log("stopped; go on with:", shlex.join(["bash", f"{place()}run_all.sh", *sys.argv[1:]]))
    for number in SIGNALS:  # as `timeout` sends it, to its child and to its group
        signal.signal(number, signal.SIG_IGN)
    sys.exit(STOPPED)


def hand_on(number, frame):
    """Ctrl-C or SIGTERM, to the stage: the first one lets it finish its step."""
    asked.append(number)
    child or stopped()
    number = signal.SIGTERM if len(asked) == 1 else number
    if os.system(f"pkill -{number:d} -g {child} -f '{STAGE}' 2>/dev/null"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)


def go(words, failed):
    """Run a command to its end; stop with `failed` where it fails, and after a signal."""
    global child
    child = begin(words)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    child = None
    if asked or code == STOPPED:
        stopped()
    if code:
        die(failed)


def place():
    """What stands before the name of a script in a command."""
    return "" if Path.cwd() == HERE else f"{HERE}/"


def launcher(out, gpus, hostfile):
    """The words before a stage's script. Two runs on one port would stop each other."""
    if not (gpus or hostfile or torch.cuda.is_available()):
        return ["python"]
    port = 20000 + zlib.crc32(os.fsencode(os.path.abspath(out))) % 9000
    while not socket.socket().connect_ex(("127.0.0.1", port)):
        port += 1
    return ["deepspeed", "--master_port", str(port), *(["--num_gpus", gpus] if gpus else []),
            *(["-H", hostfile] if hostfile else [])]


def run_pipeline(args, flags, first):
    """The stages that lab/experiments.py plans, announced and logged; then the tables."""
    start, out = time.time(), Path(args.out)
    planned, data = experiments.parse(["--plan", "--out", args.out, *flags])
    plan = [*experiments.plan(planned, data)]
    if args.dry_run:
        return
    out.mkdir(parents=True, exist_ok=True)
    lock(out, LOCK)
    for row in plan:
        if row[0] != "run":
            log(f"\n== {row[1]}" if row[0] == "note" else f"== {row[1]} is complete, skipped")
            continue
        _, name, minutes, purpose, command = row
        script, *more = shlex.split(command)
        one = ["python"] if name in ("00_data", "09_report", "clean") else first
        words, began = [*one, place() + script, *more], time.time()
        log(f"\n== {name}: {purpose}\n   {shlex.join(words)}\n   minutes expected: {minutes}")
        with open(out / "commands.log", "a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(shlex.join(words) + "\n")
        go([*words, *["--restart"] * args.restart], f"{name} failed; run it again with: "
           f"{os.environ.get('RUN_ALL_ACTIVATE', '')}{shlex.join(words)}")
        log(f"   minutes taken: {(time.time() - began) / 60:.1f}")
    page = out / "09_report/index.html"
    text = out / ("clean/summary.txt" if planned.clean else "08_evaluate/tables.md")
    if text.exists():
        log(text.read_text(encoding="utf-8"), end="")
    if not planned.clean:
        log(f"everything is in {args.out}/ (" + f"page: {page}, " * page.exists() + "commands: "
            f"{args.out}/commands.log); {(time.time() - start) / 60:.1f} minutes in all")


def run_experiments(args, flags, first):
    flags = ["--out", args.out, *flags, *["--restart"] * args.restart,
             *["--dry_run"] * args.dry_run]
    experiments.parse(flags)  # bad ones are one line
    first = ["python"] if args.dry_run else first
    go([*first, f"{place()}lab/experiments.py", *flags], "an experiment failed: try it again")
    if not args.dry_run:
        go(["python", f"{place()}09_report.py", "--out", args.out], "the report failed")
        log(f"the page is {args.out}/09_report/index.html")


def main():
    mode, words = "run", sys.argv[1:]
    if words[:1] and words[0] in ("status", "verify", "replay", "experiments", "clean"):
        mode, *words = words
    parser = common.new_parser(None, add_help=False, allow_abbrev=False)
    parser.error = lambda message: die(f"{message} (bash run_all.sh --help lists the flags)")
    flag = parser.add_argument
    flag("--out", default="out"), flag("--stage"), flag("--gpus"), flag("--hostfile")
    flag("--restart", action="store_true"), flag("--dry_run", action="store_true")
    args, flags = parser.parse_known_args(words)
    if mode in ("status", "verify", "replay") and flags:
        die(f"unknown flag {' '.join(flags)} (bash run_all.sh --help lists the flags)")
    if bool(args.stage) != (mode == "replay"):
        die("replay takes --stage NAME")
    for name in ("out", "stage", "gpus", "hostfile"):
        if getattr(args, name) == "":
            die(f"--{name} needs a value")
    if args.gpus and not (args.gpus.isdecimal() and int(args.gpus)):
        die(f"--gpus takes a positive whole number, got: {args.gpus}")
    if mode == "status":
        return status.main([args.out])
    if mode in ("verify", "replay"):
        return verify.main([args.out, *(["--replay", args.stage] if args.stage else [])])
    for number in SIGNALS:
        signal.signal(number, hand_on)
    first = launcher(args.out, args.gpus, args.hostfile)
    if mode == "experiments":
        run_experiments(args, flags, first)
    else:
        flags += ["--clean"] * (mode == "clean") + ["--dry_run"] * args.dry_run
        run_pipeline(args, flags, first)


if __name__ == "__main__":
    common.launch(main)
