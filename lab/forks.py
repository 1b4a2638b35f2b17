"""Work in forked processes: models that do not need each other, trained side by side."""
import contextlib
import ctypes
import os
import signal
import sys
import threading
from functools import partial
from pathlib import Path

import torch.distributed as dist

from lab import base

MOST = 4  # processes: each takes half a gigabyte


def fork(work):
    """→ process id of a fork of this process that does `work()` and ends as Python would, but for
    what atexit has."""
    sys.stdout.flush(), sys.stderr.flush()
    if child := os.fork():
        return child
    code = 1
    try:
        try:
            work()
            code = 0
        except KeyboardInterrupt:
            code = 130
        except SystemExit as stop:
            said = stop.code if stop.code is not None else 0
            code = said if isinstance(said, int) else 1
            code == said or print(said, file=sys.stderr)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush(), sys.stderr.flush()
    finally:  # whatever happens, this process goes no further
        os._exit(code)


def side_by_side(args, names, train, launch):
    """`train(names)`, which sets its process up and makes a model each. The embedded model, which
    two threads hardly make faster, takes one, so that its weights do not depend on a machine's
    cores; under Linux forked processes, one a core, share the names out, but not where a process
    has trained before (lab/experiments.py). All others are trained by this process, or by those of
    DeepSpeed's launcher, one after another."""
    names, single = list(dict.fromkeys(names)), base.embedded(args)
    safe = sys.platform == "linux" and threading.active_count() == 1 and not dist.is_initialized()
    lanes, children = min(base.cores(), len(names), MOST) if single and safe else 1, []
    if lanes > 1:
        base.lock(Path(args.out))  # children inherit it

    def work(lane):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no child is left behind
        os.environ["MASTER_PORT"], base.lane = "0", lane
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # torchrun's store is the parent's
        launch(lambda: train(names[lane::lanes]))

    for lane in range(1, lanes):
        children.append(fork(partial(work, lane)))
    try:
        train(names[::lanes])
    except BaseException:
        stop_all(children)
        raise
    finally:
        codes = wait_for(children) if children else []
    if set(codes) - {0, base.STOPPED, 130}:  # Ctrl-C
        raise RuntimeError("a process beside this one failed (its error is above) or was killed")
    if any(codes):
        sys.exit(base.STOPPED)


def wait_for(children):
    """→ exit codes, less than 0 for a signal. Ctrl-C meanwhile is theirs to answer, as it reaches
    them too; SIGTERM is handed on."""
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: stop_all(children)),
              signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    for number, handler in before.items():
        signal.signal(number, handler)
    return codes


def stop_all(children):
    """Have processes stop, after a checkpoint if they train."""
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)
