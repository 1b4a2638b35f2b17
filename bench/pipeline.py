"""Where the minutes of the default run go, by stage and kind of work.

    python bench/pipeline.py                  all of `bash run_all.sh`, one process on a CPU
    python bench/pipeline.py --limit 4        any flag of run_all.sh's pipeline

Each stage runs as it is, a fork as `lab/driver.py` makes it, with a clock around the functions that
do one kind of work (KINDS below); time inside sampling and evaluation counts as that, whatever they
call. driver: until the first stage begins, with what all stages import. exit: after a stage has
returned; other: what no clock is around. overhead: all but forward, backward, step, sampling and
evaluation.
Where models are trained side by side, seconds are the mean over those processes, one that is done
before the others waits under other.
"""
import time

BEGIN = time.time()
import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import shlex  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from importlib import import_module  # noqa: E402
from pathlib import Path  # noqa: E402

HERE = Path(__file__).resolve().parents[1]
KINDS = {
    "data": ["common.read_jsonl", "common.write_jsonl", "common.encode", "common.batches"],
    "collate": ["common.collate"],
    "model": ["common.load_policy", "common.load_reward_model", "common.make_engine",
              "common.frozen", "lab.base.setup"],
    "forward": ["transformers.LlamaModel.forward", "transformers.LlamaForCausalLM.forward"],
    "backward": ["deepspeed.DeepSpeedEngine.backward"],
    "step": ["common.step"],
    "sampling": ["common.generate"],
    "evaluation": ["common.score", "stage.perplexity", "stage.write_features",
                   "stage.measure_equation_17", "lab.judges.gold"],
    "saving": ["common.save_model", "lab.checkpoint.save", "common.free"],
    "hashing": ["lab.base.sha256", "lab.base.sync", "lab.base.code_hashes"]}
WORK = {"forward", "backward", "step", "sampling", "evaluation"}
COLUMNS = ["stage", "seconds", "import", *KINDS, "other", "exit", "overhead"]


class Clock:
    """Charges the time that passes to the kind of work on top of the stack."""

    def __init__(self):
        self.spent, self.stack, self.last, self.forked = {}, ["import"], time.time(), None

    def charge(self):
        now = time.time()
        self.spent[self.stack[-1]] = self.spent.get(self.stack[-1], 0) + now - self.last
        self.last = now

    def around(self, kind, function):
        def timed(*args, **more):
            self.charge()
            whole = self.stack[-1] in ("sampling", "evaluation")
            self.stack.append(self.stack[-1] if whole else kind)
            try:
                return function(*args, **more)
            finally:
                self.charge()
                self.stack.pop()
        return timed

    def follow_forks(self, out):
        """Each forked process leaves its times beside the file `out`; `whole` takes them in."""
        def parent():
            self.charge()
            self.forked = self.forked or dict(self.spent)

        def child():
            self.spent, self.stack, self.last = {}, ["other"], time.time()

        def leave(code, leave=os._exit):
            self.charge()
            Path(f"{out}.{os.getpid()}").write_text(json.dumps(self.spent))
            leave(code)

        os.register_at_fork(after_in_parent=parent, after_in_child=child)
        os._exit = leave

    def whole(self, out):
        """→ seconds by kind; since the first fork, the mean over all processes."""
        before, files = self.forked or self.spent, Path(out).parent.glob(f"{Path(out).name}.*")
        lanes = [{k: v - before.get(k, 0) for k, v in self.spent.items()}]
        seconds = sum(lanes[0].values())
        for file in list(files):
            lane = json.loads(file.read_text())
            lane["other"] = lane.get("other", 0) + seconds - sum(lane.values())
            lanes.append(lane)
            file.unlink()
        return {k: before.get(k, 0) + sum(lane.get(k, 0) for lane in lanes) / len(lanes)
                for k in {*before, *(k for lane in lanes for k in lane)}}


def run_stage(script, argv, out):
    """One stage in this process, its times in the file `out`."""
    import common
    clock, sys.argv = Clock(), [str(HERE / script), *argv]
    stage = import_module(script.removesuffix(".py"))
    ours = [m for name, m in list(sys.modules.items())
            if name == "common" or name.startswith("lab.") or m is stage]
    for kind, names in KINDS.items():
        for name in names:
            owner, _, name = name.rpartition(".")
            if "." in owner and not owner.startswith("lab."):  # a method
                package, _, owner = owner.rpartition(".")
                owner = getattr(import_module(package), owner)
                setattr(owner, name, clock.around(kind, getattr(owner, name)))
                continue
            old = getattr(stage if owner == "stage" else import_module(owner), name, None)
            new = old and clock.around(kind, old)
            for module in ours:  # under whatever name a module took it
                for key, value in list(vars(module).items()):
                    if old and value is old:
                        setattr(module, key, new)
    clock.charge()
    clock.stack = ["other"]
    clock.follow_forks(out)
    try:
        common.launch(stage.main)
    finally:
        clock.charge()
        Path(out).write_text(json.dumps({**clock.whole(out), "end": time.time()}))


def main():
    import harness
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--report", help="file of the results (bench/pipeline.json)")
    args, more = flags.parse_known_args()
    from lab import driver, experiments
    leave = os._exit  # a clock takes it in a stage
    with tempfile.TemporaryDirectory() as folder:
        planned, data = experiments.parse(["--plan", "--out", f"{folder}/out", *more])
        begin = time.time()
        plan = [(row[1], row[4]) for row in experiments.plan(planned, data) if row[0] == "run"]
        other = time.time() - begin
        driver.warm()
        seconds = time.time() - BEGIN
        rows = [{"stage": "driver", "seconds": seconds, "import": seconds - other, "other": other,
                 "overhead": 1}]
        for name, command in plan:
            times, begin = f"{folder}/times.json", time.time()
            if not (child := os.fork()):
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                script, *argv = shlex.split(command)
                code = 1
                try:
                    run_stage(script, argv, times)
                    code = 0
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                leave(code)
            if os.waitpid(child, 0)[1]:
                sys.exit(f"{name} failed")
            end, found = time.time(), json.loads(Path(times).read_text())
            found["exit"] = end - found.pop("end")
            row = {"stage": name, "seconds": end - begin, **found}
            row["overhead"] = 1 - sum(found.get(kind, 0) for kind in WORK) / row["seconds"]
            rows.append(row)
            print(f"{name}: {row['seconds']:.1f} s", flush=True)
    whole = {"stage": "all", **{c: sum(r.get(c, 0) for r in rows) for c in COLUMNS[1:-1]}}
    whole["overhead"] = 1 - sum(whole[kind] for kind in WORK) / whole["seconds"]
    harness.report("pipeline", [*rows, whole], COLUMNS, args.report, flags=more)


if __name__ == "__main__":
    main()
