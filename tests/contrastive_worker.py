"""Stage 05 as it is, for test_stages.py, with two parts replaced: dropout, which differs between
processes by design,
by a shift of the embeddings that depends on token and view only; and AdamW, which hides a gradient
of the wrong
size, by SGD. Also keeps the whole state, prototypes included: `contrastive_worker.py FILE_PREFIX
CASE... -- FLAGS`."""
import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch  # noqa: E402

import common  # noqa: E402
import deepspeed  # noqa: E402, F401  (it derives classes from AdamW, so before AdamW is replaced)

load, config, save = common.load_reward_model, common.engine_config, common.save_model


def two_views(embedding, inputs, output):
    """Tokens of the first half of a training batch are view s, the others view t."""
    if not embedding.training:
        return output
    ids, place = inputs[0], torch.arange(inputs[0].numel()).view(inputs[0].shape)
    view = place >= ids.numel() // 2
    wave = torch.arange(1, output.shape[-1] + 1) * (ids[..., None] + 1) + 2.0 * view[..., None]
    return output + 0.05 * torch.sin(wave)


def load_with_views(*args, **kwargs):
    model = load(*args, **kwargs)
    model.model.get_input_embeddings().register_forward_hook(two_views)
    return model


common.load_reward_model = load_with_views
torch.equal = lambda *tensors: False  # 05 asks whether dropout changes anything: it is off here
common.engine_config = lambda *args: config(*args) | {"zero_allow_untested_optimizer": True}
torch.optim.AdamW = type("PlainSGD", (torch.optim.SGD,), {
    "__init__": lambda self, parameters, lr, **_: torch.optim.SGD.__init__(self, parameters, lr=lr)
})

argv = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
prefix, cases, flags = argv[0], argv[1:argv.index("--")], argv[argv.index("--") + 1:]
for case in cases:
    method, zero = case.split(":")

    def save_all(engine, path, tokenizer, file=f"{prefix}_{method}_{zero}.pt"):
        zero3 = engine.zero_optimization_stage() == 3
        state = engine._zero3_consolidated_16bit_state_dict(
        ) if zero3 else engine.module.state_dict()
        if common.rank() == 0:
            torch.save({k: v.clone() for k, v in state.items()}, file)
        save(engine, path, tokenizer)

    common.save_model = save_all
    import_module("05_rm_contrastive").main([
        *flags, "--methods", method, "--zero", zero, "--dropout", "0", "--name",
        Path(prefix).name + f"_{method}_{zero}"])
