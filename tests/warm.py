"""For conftest.run: Python that has imported what stages import, and runs each command that it is
sent as a fork, as lab/driver.py does: a start is most of a small command's time. What is read when
a module is imported (PYTHONIOENCODING, HF_HOME, DS_ACCELERATOR) is that of this process.

A line on stdin: [words behind `python`, environment, file for the output, processes]; on stdout:
the exit code. Of several processes, ranks as DeepSpeed's launcher makes them, the first that fails
ends the others.
"""
import atexit
import json
import os
import runpy
import signal
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from lab import driver  # noqa: E402
from lab.forks import fork  # noqa: E402


def work(words, environment, log):
    """What `python WORDS` does in this environment, but that atexit's functions come before what is
    said of an error."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear(), os.environ.update(environment)
    if "WORLD_SIZE" in environment and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count()))  # they spin while they wait for each other
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.modules.pop(words[1], None)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def ranks(words, environment, log, n):
    """→ the first exit code that is not 0."""
    script, *flags = words
    at_work, failed = [], 0
    for rank in map(str, range(n)):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(n), "LOCAL_SIZE": str(n)}
        at_work.append(fork(partial(
            work, [script, f"--local_rank={rank}", *flags], environment | own, log)))
    while at_work:
        pid, status = os.wait()
        at_work.remove(pid)
        failed = failed or os.waitstatus_to_exitcode(status)
        for other in at_work if failed else ():
            os.kill(other, signal.SIGKILL)
    return failed


if __name__ == "__main__":
    driver.warm()
    for line in sys.stdin:
        words, environment, log, n = json.loads(line)
        open(log, "w").close()
        if n:
            code = ranks(words, environment, log, n)
        else:
            child = fork(partial(work, words, environment, log))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, flush=True)
