"""What everything stands on: ranks, seeds and devices, one-line errors, files that are there whole
or not at all, and their hashes. Stages see these names through `common`."""
import argparse
import ast
import contextlib
import fcntl
import functools
import gc
import hashlib
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
gc.disable()  # imports make a million objects and no garbage

import numpy  # noqa: E402  (after the environment is set)
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from tqdm import tqdm  # noqa: E402

gc.enable()
tqdm.monitor_interval = 0  # no thread beside the main one, which lab/forks.py forks
for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):  # a terminal of Latin-1 shows ? for what it lacks
        stream.reconfigure(errors="replace")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it looked for a GPU
HERE = Path(__file__).resolve().parents[1]
STOPPED = 75  # exit code of a stage that a signal stopped after a checkpoint (EX_TEMPFAIL)
locks, lane = {}, 0  # lane: among the processes of lab/forks.py
SAMPLING = {  # rows of the stages that sample: (paper, small, toy, help)
    "temperature": (0.8, 0.8, 1.0, "sampling temperature"),
    "top_p": (0.9, 0.9, 1.0, "nucleus sampling"),
    "repetition_penalty": (1.1, 1.1, 1.0, "of sampling")}
# hyperparameters that 0 would make meaningless, and those that are a share
POSITIVE = {"epochs", "lr", "actor_lr", "critic_lr", "temperature", "top_p", "repetition_penalty",
            "simcse_tau", "swav_tau", "epsilon", "reward_clip", "clip", "value_clip"}
SHARES = {"warmup", "top_p", "gamma", "lam", "dropout", "valid_fraction"}
# the instructions for bf16: where a CPU has none, a matrix product takes a hundred times as long
FAST_BF16 = torch.cuda.is_available() or \
    torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


# ---------------------------------------------------------------- processes

def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def device():
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) \
        if torch.cuda.is_available() else torch.device("cpu")


def set_seed(seed):
    """Seed python, numpy and torch. Callers add the rank where ranks must differ."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def embedded(args):
    """Whether the model is the embedded one at its own preset, in one process on a CPU."""
    return args.run.get("model") == "tiny" and args.preset == "toy" and world_size() == 1 and \
        device().type == "cpu"


def setup(args, one_thread=False):
    """Join the process group (also under plain `python`), share the cores between ranks, seed.
    one_thread: the embedded model takes one, so that its weights do not depend on the cores."""
    import logging
    from importlib.util import find_spec
    gc.disable()
    import deepspeed
    from transformers.utils import logging as hf_logging
    replace_attention()
    gc.enable(), gc.freeze()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    hf_logging.disable_progress_bar()
    if getattr(args, "tensorboard", False) and not find_spec("tensorboard"):
        die("--tensorboard needs its package: pip install tensorboard")
    if "RANK" not in os.environ:  # plain `python NN.py`: a group of one, on any port that is free
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1",
                          MASTER_PORT="0")
    if args.deterministic:
        if device().type == "cuda" and getattr(args, "top_p", 1) < 1:
            die("--deterministic needs --top_p 1 on a GPU: a nucleus takes a cumulative sum, which "
                "is not deterministic there")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    if device().type == "cuda":
        torch.cuda.set_device(device())
    else:
        sizes = map(os.environ.get, ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"))  # DeepSpeed's, torchrun's
        local = int(next(filter(None, sizes), world_size()))
        one = one_thread and embedded(args)
        torch.set_num_threads(1 if one else max(1, cores() // local))
    # the one operator that DeepSpeed would compile here serves inference only; compiling it needs
    # a C++ compiler, and a process killed meanwhile leaves a lock that all others wait for
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        deepspeed.init_distributed("nccl" if device().type == "cuda" else "gloo", verbose=False)
    set_seed(args.seed)
    if lane == 0:
        log(f"{Path(sys.argv[0]).name}: preset {args.preset}, seed {args.seed}, {world_size()} "
            f"process(es) on {device().type}",
            *(f"{k} {v}" for k, v in args.hparams.items()), sep=", ")
    if not FAST_BF16 and getattr(args, "precision", "fp32") != "fp32":
        log(f"warning: this CPU has no bf16: --precision fp32 takes a hundredth of the time of "
            f"{args.precision}")


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def barrier():
    if dist.is_initialized():
        dist.barrier()


def gather_rows(mine):
    """Concatenate every rank's list of (index, value) and return the values in index order.
    Values are pickled one by one: numbers and lists go fast, tensors do not."""
    parts = [mine]
    if dist.is_initialized() and world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, mine)
    rows = sorted((item for part in parts for item in part), key=lambda item: item[0])
    return [value for _, value in rows]


def from_rank_0(work):
    """work() on rank 0, its result on every rank. Where it stops rank 0, the launcher stops all."""
    result = [work() if rank() == 0 else None]
    if dist.is_initialized() and world_size() > 1:
        dist.broadcast_object_list(result)
    return result[0]


@contextlib.contextmanager
def inference(args):
    """Forward passes without gradient, in the run's precision."""
    with torch.no_grad(), torch.autocast(device().type, torch.bfloat16,
                                         enabled=args.precision == "autocast"):
        yield


def replace_attention():
    """Make transformers' "sdpa" take the shared layout. The import takes two seconds, so it is
    where models are."""
    import lab.attention  # noqa: F401


def recompute_activations(model):
    """In the backward pass, where models of its family can: they need not be kept until then."""
    if model.supports_gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        log(f"{model.config.model_type} models cannot recompute activations: all are kept")


def save_stock(module, state, tokenizer, path):
    """Stock files of a model and its tokenizer. Other tools still have transformers 4, which knows
    the tokenizer's class by another name, would hand token types on, which few models take, and
    miss the base of the rotary embedding in silence: rewards would be others."""
    module.save_pretrained(path, state_dict=state)
    tokenizer.save_pretrained(path)
    config = read_json(file := Path(path) / "tokenizer_config.json")
    if config.get("tokenizer_class") == "TokenizersBackend":
        config |= {"tokenizer_class": "PreTrainedTokenizerFast",
                   "model_input_names": ["input_ids", "attention_mask"]}
        write_text(file, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    config = read_json(file := Path(path) / "config.json")
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        other = rope.get("rope_type", "default") != "default"
        config |= {"rope_theta": rope["rope_theta"]} | ({"rope_scaling": {
            k: v for k, v in rope.items() if k != "rope_theta"}} if other else {})
        write_text(file, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def initialize(**settings):
    """A DeepSpeed engine. Its import takes half a second, so it is where engines are."""
    import deepspeed
    return deepspeed.initialize(**settings)[0]


def free(engine):
    """Give a finished model's memory back (engines sit in reference cycles)."""
    engine.destroy()
    engine.optimizer = engine.module = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- what people see

def die(message):
    """Print one line, once a machine, and stop with exit code 2."""
    if int(os.environ.get("LOCAL_RANK", rank())) == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def finite(values):
    """The values of a model as a tensor, or an error where one is no number."""
    values = torch.as_tensor(values)
    if bad := int((~torch.isfinite(values)).sum()):
        die(f"{bad} of {values.numel()} values of the model are not finite: its weights are not, "
            "or its numbers are too large for bf16 (--precision fp32)")
    return values


def first_line(error):
    """Of an exception's message; where it has none, its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def new_parser(doc, **more):
    """A parser of flags whose help is `doc` as it stands; what it does not take is one line."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **more)
    parser.error = lambda message: die(f"{message} ({parser.prog} --help lists the flags)")
    return parser


def value_of(args, name, row, column):
    """A hyperparameter: a flag's value, else that of the preset's column, where `small` computes in
    fp32 instead of autocast on a CPU without bf16."""
    if getattr(args, name) is not None:
        return getattr(args, name)
    slow = column == 1 and name == "precision" and not FAST_BF16
    return "fp32" if slow else row[column]


def check_value(name, value, row):
    """Stop on a number that a hyperparameter cannot be meant to have. row: its columns."""
    if isinstance(value, (bool, str)):
        return
    most, above = (1 if name in SHARES else math.inf), name in POSITIVE
    least = {"k": 2, "freeze_prototypes": 0, "max_prompt_tokens": 2, "max_response_tokens": 8}.get(
        name, type(value) is int and 0 not in row[:3])  # room for a BOS, and for what ends a turn
    if not (least <= value <= most and value != math.inf and (value or not above)):
        die(f"--{name} must be {'above' if above else 'at least'} {least:d}"
            + " and at most 1" * (most == 1) + f", not {value}")


def log(*parts, **more):
    """Print on rank 0."""
    if rank() == 0:
        print(*parts, **more, flush=True)


def progress(iterable, description, total=None, initial=0):
    """tqdm on rank 0; few lines when stderr is a file. `initial`: steps done before."""
    # in a log file: a line now and then, none for what ends soon
    slow = {"position": lane} if sys.stderr.isatty() else {"mininterval": 20, "delay": 20}
    return tqdm(iterable, description, total, initial=initial, disable=rank() != 0, leave=False,
                **slow)


EVENTS = "events.out.tfevents"  # what the names of TensorBoard's files begin with


def event_writer(args, folder, done):
    """With --tensorboard a function (values, step) that adds a line of metrics.jsonl to event files
    in `folder`; what they have after step `done` is forgotten. Else None."""
    if not getattr(args, "tensorboard", False):
        return None
    from torch.utils.tensorboard import SummaryWriter  # a second to import
    writer = SummaryWriter(folder, purge_step=done + 1 if done else None)

    def add(values, step):
        for name, value in values.items():
            if isinstance(value, (int, float)):
                writer.add_scalar(name, value, step)
        writer.flush()
    return add


def launch(main, clean_up=lambda: None):
    """Run `main`. Whatever goes wrong is one line, once a machine, and exit code 2; --debug
    shows the traceback as well. `clean_up()` is called first."""
    gc.freeze()  # nor are they garbage later
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()  # or a rank that leaves early may abort
        gc.freeze()  # a second less at the end
    except SystemExit as stop:
        if stop.code == 2:
            clean_up()
        raise
    except KeyboardInterrupt:
        if rank() == 0:
            print("interrupted: the same command goes on from what is written", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        clean_up()
        if "--debug" in sys.argv:
            raise
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        if rank() > 0:
            time.sleep(5)  # rank 0 says it, if it failed as well: the launcher ends this one first
        text = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
        if isinstance(error, OSError) and error.strerror:
            text = error.strerror + (f": {error.filename}" if error.filename else "")
        elif isinstance(error, torch.OutOfMemoryError):
            text = "out of memory: lower --micro_batch_size, or more processes, or a higher --zero"
        elif "probability tensor contains" in text:  # on a GPU it is an assert of the device's
            text = "a policy's probabilities are no numbers: it has diverged, its base is bad, " \
                "or its numbers are too large for bf16 (--precision fp32)"
        elif world_size() > 1 and ("by peer" in text or "remote peer" in text):
            text = "another process ended or its machine is lost, see what it said; the same " \
                "command goes on from the last checkpoint"
        print(f"error: {Path(sys.argv[0]).name}: {text} (--debug shows the traceback)",
              file=sys.stderr, flush=True)
        sys.exit(2)


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
            rows.extend(map(json.loads, file))
    except FileNotFoundError:
        die(f"{path} is missing")
    except ValueError as error:
        die(f"{path}:{len(rows) + 1}: not JSON in UTF-8 ({error})")
    return rows


def write_text(path, text):
    """Write a file under a temporary name, flush it to the disk and rename it: it is there whole
    or not at all."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def subset(rows, n, seed):
    """n of the rows drawn at random, in their old order; all of them when there are no more."""
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)),
                                                               min(n, len(rows))))]


def fill(template, /, **values):
    """The text of a template of lab/ with these values, which are escaped in HTML."""
    import jinja2
    html = template.endswith(".html")
    form = jinja2.Environment(
        autoescape=html, trim_blocks=True, lstrip_blocks=not html, keep_trailing_newline=not html,
        loader=jinja2.FileSystemLoader(HERE / "lab"))
    return form.get_template(template).render(values)


def write_jsonl(path, rows):
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def sha256(path):
    """Hex digest of a file, streamed; a progress bar for those of a gigabyte and more."""
    size, digest = os.path.getsize(path), hashlib.sha256()
    with open(path, "rb") as file, tqdm(
            total=size, desc=f"hashing {Path(path).name}", unit="B", unit_scale=True, leave=False,
            disable=size < 2 ** 30 or rank() > 0) as bar:
        while chunk := file.read(2 ** 22):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def sync(path):
    """The file is on the disk, not in the cache only, when this returns. → its hash."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return sha256(path)


def user_files(path):
    """Absolute paths of a user's own file, or of all files in a directory but hidden ones, behind
    links to folders too."""
    path = Path(path).resolve()
    found, seen = [path], {str(path)}
    for folder, below, names in os.walk(path, followlinks=True):
        found += [Path(folder, name) for name in names if name[0] != "."]
        real = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(below)
                if name[0] != "."}
        below[:] = [name for name in real if real[name] not in seen]  # or a circle has no end
        seen.update(real.values())
    return [str(p) for p in sorted(found) if p.is_file()]


code_hash = functools.cache(sha256)  # a file that is changed later is not what this process runs


@functools.cache
def code_hashes(script):
    """{file: sha256} of a script and of the project's files that it imports, at any depth."""
    files, todo = {}, [script]
    while todo:
        if (name := todo.pop()) in files or not (HERE / name).is_file():
            continue
        files |= {str(p.relative_to(HERE)): code_hash(p)  # and the data beside it
                  for p in (HERE / name).parent.glob(f"{Path(name).stem}.*") if p.is_file()}
        for node in ast.walk(ast.parse((HERE / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "stage_of":
                todo += [a.value for a in node.args if isinstance(a, ast.Constant)]  # lab's own
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = getattr(node, "module", None)
                names = [f"{module}.{a.name}" if module else a.name for a in node.names]
                todo += [f"{n.replace('.', '/')}.py" for n in [*names, module or ""]]
    return dict(sorted(files.items()))


def check_shared(out):
    """Stop where not every process sees the directory in which rank 0 writes."""
    name = from_rank_0(lambda: tempfile.NamedTemporaryFile(dir=out, prefix=".shared_", delete=False)
                       .name.rpartition("/")[2])
    sees = gather_rows([(rank(), (out / name).exists())])
    if rank() == 0:
        (out / name).unlink()
    if not all(sees):
        dist.destroy_process_group()  # or the first to leave aborts the others
        die(f"process {sees.index(False)} does not see what process 0 writes to {out}: --out must "
            "be one directory that all machines share")


def lock(out, name=".lock"):
    """Hold a run directory until the end of this process, however it ends."""
    if (out, name) in locks:
        return
    file = open(out / name, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        die(f"{out} is in use by process {file.read().strip()}: wait for it, or give another --out")
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    locks[out, name] = file
