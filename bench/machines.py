"""Two machines for real: hosts in network namespaces of their own, one process each.

    sudo python bench/machines.py          a few minutes; needs `ip netns` (root, iproute2)

Stages 01, 02, 04, 06 and 07 of a small toy run go once as `deepspeed --num_gpus 2` on one machine
and once as `deepspeed --hostfile ... --no_ssh --node_rank R` on both hosts, which share --out; what
they write must be the same. Then one host is killed in the middle of a stage, and the run goes on;
then each host is given an --out of its own, which must be said at once.
"""
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness  # first: it puts the project on the path

from lab.base import sha256

HERE = Path(__file__).resolve().parents[1]
HOSTS = {"rlhf_a": "10.77.0.1", "rlhf_b": "10.77.0.2"}
STAGES = [("01_sft", []), ("02_rm_ensemble", ["--M", "2"]), ("03_strength", ["--M", "2"]),
          ("04_rm_denoise", ["--methods", "baseline"]), ("06_ppo", []), ("07_metarm", [])]
ALONE = {"03_strength"}  # of one process, in both runs


def ip(*words, check=True):
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True).returncode


def connect():
    """Two namespaces with a cable between them."""
    disconnect()
    a, b = HOSTS
    for host in HOSTS:
        ip("netns", "add", host)
    ip("link", "add", "veth_a", "netns", a, "type", "veth", "peer", "name", "veth_b", "netns", b)
    for host, address in HOSTS.items():
        ip("-n", host, "link", "set", "lo", "up")
        ip("-n", host, "addr", "add", f"{address}/24", "dev", f"veth_{host[-1]}")
        ip("-n", host, "link", "set", f"veth_{host[-1]}", "up")


def disconnect():
    for host in HOSTS:
        ip("netns", "del", host, check=False)


def start(hostfile, stage, outs, more=()):
    """One launcher on each host, which has a core of its own: more threads would add in another
    order. → their processes"""
    found = []
    for node, (host, address) in enumerate(HOSTS.items()):
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": f"veth_{host[-1]}",
                       "DS_ACCELERATOR": "cpu"}
        found.append(subprocess.Popen(
            ["taskset", "-c", str(node), "ip", "netns", "exec", host, "deepspeed", "--hostfile",
             hostfile, "--no_ssh", "--node_rank", str(node), "--master_addr", HOSTS["rlhf_a"],
             "--master_port", "29555",
             f"{stage}.py", "--out", str(outs[node]), "--limit", "3", *more],
            cwd=HERE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True))
    return found


def ends(processes, limit=120):
    """(exit code, lines that begin with error:) of each."""
    out = []
    for process in processes:
        try:
            text, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text = "error: it hung\n" + process.communicate()[0]
        out.append((process.returncode, [line for line in text.splitlines()
                                         if line.lower().startswith(("error:", "interrupted"))]))
    return out


def written(out):
    return {str(p.relative_to(out)): sha256(p) for p in sorted(out.rglob("*.safetensors"))}


def main():
    if ip("netns", "add", "rlhf_probe", check=False):
        sys.exit("network namespaces cannot be made here (root and iproute2 are needed)")
    ip("netns", "del", "rlhf_probe")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        hostfile = folder / "hostfile"
        hostfile.write_text("".join(f"{address} slots=1\n" for address in HOSTS.values()))
        one, two = folder / "one", folder / "two"
        connect()
        try:
            for out in (one, two):
                subprocess.run([sys.executable, "00_data.py", "--out", out, "--limit", "3"],
                               cwd=HERE, check=True, capture_output=True)
            for stage, more in STAGES:
                begin = time.time()
                if stage in ALONE:
                    for out in (one, two):
                        subprocess.run([sys.executable, f"{stage}.py", "--out", out, "--limit",
                                        "3", *more], cwd=HERE, check=True, capture_output=True)
                    continue
                subprocess.run(
                    ["deepspeed", "--num_gpus", "2", "--master_port", "29556", f"{stage}.py",
                     "--out", one, "--limit", "3", *more], cwd=HERE, check=True,
                    capture_output=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})
                middle = time.time()
                done = ends(start(hostfile, stage, (two, two), more))
                a, b = written(one), written(two)
                rows.append({"check": stage, "one_machine_s": middle - begin,
                             "two_machines_s": time.time() - middle, "exit": [x for x, _ in done],
                             "result": "same bytes" if a == b else
                             f"{sum(a.get(k) != b.get(k) for k in a | b)} files differ",
                             "errors": sum((e for _, e in done), [])})
                print(rows[-1], flush=True)
            shutil.rmtree(two / "01_sft")
            begin = time.time()
            running = start(hostfile, "01_sft", (two, two), ["--limit", "40", "--save_every", "1"])
            while not list(two.glob("01_sft.partial/checkpoint_*/checkpoint.json")):
                time.sleep(0.2)
            os.killpg(running[1].pid, signal.SIGKILL)
            subprocess.run("ip netns pids rlhf_b | xargs -r kill -9", shell=True)
            killed, after = ends(running, 60), time.time() - begin
            again = ends(start(hostfile, "01_sft", (two, two),
                               ["--limit", "40", "--save_every", "1"]))
            rows.append({"check": "host b killed, same command again", "two_machines_s": after,
                         "exit": [x for x, _ in killed] + [x for x, _ in again],
                         "result": "went on" if (two / "01_sft/manifest.json").exists() else
                         "did not go on", "errors": killed[0][1]})
            print(rows[-1], flush=True)
            for out in (one, two):
                shutil.rmtree(out / "01_sft", ignore_errors=True)
            begin = time.time()
            done = ends(start(hostfile, "01_sft", (one, two)), 60)
            rows.append({"check": "--out not shared", "two_machines_s": time.time() - begin,
                         "exit": [x for x, _ in done],
                         "result": "refused" if all(x for x, _ in done) else "not seen",
                         "errors": sum((e for _, e in done), [])})
        finally:
            disconnect()
    harness.report("machines", rows, ["check", "one_machine_s", "two_machines_s", "exit", "result",
                                      "errors"])


if __name__ == "__main__":
    main()
