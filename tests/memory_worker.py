"""Peak memory of small Llamas as stages use them, beside what bench/memory.py works out, for
test_scale.py: `memory_worker.py RESULTS.json CASE...`, each in JSON, on any number of processes."""
import gc
import json
import sys
import weakref
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "bench")]
import harness  # noqa: E402  (first: it sets DeepSpeed's environment)
import memory  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402

import common  # noqa: E402
from lab import attention  # noqa: E402

metarm = import_module("07_metarm")
attention.SHORT = 10**9  # padded rows in one call, as on GPUs
TOKENIZER = transformers.PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2})),
    pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def alive():
    gc.collect()
    return [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]


class Tracker(TorchDispatchMode):
    """Bytes of all storages, now and at most. (torch's MemTracker takes one call of a module.)"""
    def __init__(self, tensors):
        super().__init__()
        self.now = self.most = 0
        self.held = set()
        for x in tensors:
            self.hold(x)

    def hold(self, x):
        if isinstance(x, torch.Tensor) and (key := x.untyped_storage()._cdata) not in self.held:
            storage = x.untyped_storage()
            self.held.add(key)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.drop, key, storage.nbytes())

    def drop(self, key, size):
        self.held.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map(self.hold, out)
        return out


def peak(work, others):
    """Highest bytes of the tensors alive, but for `others`, while work() runs a third time."""
    work(), work()
    with Tracker([x for x in alive() if id(x) not in others]) as tracker:
        work()
    return tracker.most


def measure(path, kind, precision="fp32", zero=0, checkpointing=False, layers=4, V=2000, H=128,
            head_dim=None, tied=False, kv=4, B=4, prompt=32, response=32, K=2):
    """→ bytes worked out, bytes measured."""
    world, others = common.world_size(), {id(x) for x in alive()}
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=3 * H, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=kv, head_dim=head_dim, bos_token_id=1,
        eos_token_id=2, tie_word_embeddings=tied)
    args = harness.settings(
        batch_size=2 * B * world, micro_batch_size=B, precision=precision, zero=zero,
        gradient_checkpointing=checkpointing, run={"max_response_tokens": response},
        eta=1e-3, temperature=1.0, top_p=0.9, repetition_penalty=1.0, generate_batch_size=B,
        lr=1e-4)
    groups = harness.groups_of([(prompt, *[response] * K)] * 2 * B * world, V)
    shapes, policy = (config, B, prompt, K, response, precision, checkpointing), kind in (
        "policy", "sampling")
    P, width = memory.parameters(config, policy), 2 if precision == "bf16" else 4
    out = memory.states(P, precision, zero, world) + memory.forward_and_backward(*shapes, policy)
    common.barrier()
    transformers.LlamaForCausalLM(config).save_pretrained(path)  # rank 0 writes
    common.barrier()
    model = common.load_policy(path, args) if policy else \
        common.load_reward_model(path, args, head_seed=0)
    if kind == "sampling":
        out = P * width + memory.sampling(config, B * K, prompt, response, precision)
    elif policy:
        engine = common.make_engine(model, args, args.batch_size, 1e-4, 9)
    else:
        rm = common.RewardEngine(model, SimpleNamespace(args=args, done=1), TOKENIZER, groups, 9)
    if kind == "metarm":
        out += P * width / (world if zero == 3 else 1)

    def work():
        if kind == "sampling":
            common.generate(model, TOKENIZER, [g["prompt"] for g in groups], K, args, 0)
        elif kind == "policy":
            for micro in common.micro_batches(groups, B):
                batch = common.collate(micro, 0)
                logits = common.response_logits(engine, batch)
                engine.backward(-common.token_logps(logits, batch["response_ids"]).mean())
                common.step(engine)
        elif kind == "reward":
            for micro in rm.micro_batches(groups):
                rm.backward(metarm.vanilla_loss(rm(micro)[0]))
                rm.step()
        else:
            metarm.backward(rm, metarm.difference_loss, groups)
            theta = metarm.ascend(rm.engine, args.eta)
            metarm.backward(rm, metarm.vanilla_loss, groups)
            metarm.restore(rm.engine, theta)
            rm.step()

    return out, peak(work, others)


if __name__ == "__main__":
    results, *cases = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    model = Path(results).with_suffix(".model")
    common.setup(harness.settings(out=str(model.parent), run={}))
    found = [measure(model, **json.loads(case)) for case in cases]
    if common.rank() == 0:
        Path(results).write_text(json.dumps(found))
