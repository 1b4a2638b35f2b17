"""One row for all groups (shared) or one for each response (separate) is the same model; saved
models are stock checkpoints.

The reference is the stock model on one unpadded row [prompt | response] at a time, which needs
neither a mask nor an index. Models are tiny and random, with weights large enough that attention
and position matter."""
import math
import random
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
import transformers
from tokenizers import processors
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import common
from lab import attention as attend

ARGS = SimpleNamespace(precision="fp32", zero=0, layout="auto", eval_batch_size=4,
                       micro_batch_size=4)
VOCAB, PAD, EOS = 300, 0, 1
BASE = {"vocab_size": VOCAB, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
SIZE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GQA = {**SIZE, "num_key_value_heads": 2, "head_dim": 8}
# A model's initialisation: wide enough that rewards differ by much more than the tolerance.
CONFIGS = {
    "llama":
        lambda: transformers.
        LlamaConfig(**BASE, **GQA, initializer_range=0.2, tie_word_embeddings=True), "qwen2":
            lambda: transformers.
            Qwen2Config(**BASE, **SIZE, num_key_value_heads=2, initializer_range=0.2), "gpt2":
                lambda: transformers.GPT2Config(**BASE, n_embd=32, n_layer=2, n_head=4, n_positions=
                                                128, initializer_range=0.2),
    "neox":
        lambda: transformers.
        GPTNeoXConfig(**BASE, **SIZE, initializer_range=0.2, max_position_embeddings=128), "gemma":
            lambda: transformers.GemmaConfig(**BASE, **GQA, initializer_range=0.2), "opt":
                    lambda: transformers.OPTConfig(
                        **BASE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=
                        64, word_embed_proj_dim=32, max_position_embeddings=128, init_std=0.2),
    "mistral_window":
        lambda: transformers.MistralConfig(**BASE, **GQA, sliding_window=6, initializer_range=0.2),}
# ALiBi computes its bias from a 2-D mask; Gemma 2 caps its scores, which SDPA cannot; a convolution
# sees the group before.
CANNOT = {
    "gemma2":
        lambda: transformers.
        Gemma2Config(**BASE, **GQA, initializer_range=0.2, query_pre_attn_scalar=8),
    "bloom":
        lambda: transformers.
        BloomConfig(**BASE, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2), "mpt":
            lambda: transformers.MptConfig(**BASE, d_model=32, n_layers=2, n_heads=4, max_seq_len=
                                           128, initializer_range=0.2),
    "falcon_alibi":
        lambda: transformers.FalconConfig(**BASE, hidden_size=32, num_hidden_layers=2,
                                          num_attention_heads=4, alibi=True, initializer_range=0.2),
    "qwen3_next":
        lambda: transformers.Qwen3NextConfig(
            **BASE, **GQA, layer_types=["linear_attention", "full_attention"], num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32,
            linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
            linear_value_head_dim=8, initializer_range=0.2),}
ALL = CONFIGS | CANNOT


@pytest.fixture(params=["segments", "rows"])
def attention(request, monkeypatch):
    """Both ways of the shared layout's attention: a CPU's on long rows, and the other."""
    monkeypatch.setattr(attend, "SHORT", 0 if request.param == "segments" else 1e9)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For tensors this small a second thread only costs time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(name, auto):
    """A tiny random model in eval mode, on the device of the run."""
    torch.manual_seed(0)
    config = ALL[name]()
    config.num_labels = 1
    return auto.from_config(config).eval().to(common.device())


def make_groups(K, n=4, seed=0, longest=10):
    """Ragged groups; the first response is nothing but EOS."""
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(2, VOCAB) for _ in range(rng.randint(low, high))]

    groups = [{
        "id": str(i), "prompt": ids(1, longest),
        "responses": [ids(0, longest) + [EOS] for _ in range(K)]} for i in range(n)]
    groups[0]["responses"][0] = [EOS]
    return groups


def stock_rewards(model, groups):
    """[B, K] by the whole stock classifier, one unpadded row at a time."""
    rows = [[g["prompt"] + r for r in g["responses"]] for g in groups]
    return torch.stack([
        torch.stack([model(torch.tensor([row], device=common.device())).logits[0, 0]
                     for row in k])
        for k in rows])


def padded(rows, T):
    """List over responses of [t, ...] → [B*K, T, ...], zeros after the end."""
    return torch.stack([
        torch.nn.functional.pad(x, [0, 0] * (x.dim() - 1) + [0, T - len(x)]) for x in rows])


def stock_values(model, groups, T):
    """V(s_t) [B, K, T]: the head on the state before each response token, from one unpadded row at
    a time."""
    out = []
    for g in groups:
        for r in g["responses"]:
            row = torch.tensor([g["prompt"] + r], device=common.device())
            out.append(
                model.score(model.base_model(row).last_hidden_state[0])[len(g["prompt"]) - 1:-1, 0])
    return padded(out, T).view(len(groups), -1, T)


def stock_logps(model, groups, T):
    """log p(y_t | x, y_<t) [B, K, T] by the stock causal LM, one unpadded row at a time."""
    out = []
    for g in groups:
        for r in g["responses"]:
            row = torch.tensor([g["prompt"] + r], device=common.device())
            logp = model(row).logits[0, :-1].log_softmax(-1)
            out.append(logp[range(len(logp)), row[0, 1:]][len(g["prompt"]) - 1:])
    return padded(out, T).view(len(groups), -1, T)


def gradients(model, loss):
    """Gradient of every parameter; zeros where the loss does not reach."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]


def assert_same_gradients(ours, expected):
    """1e-5 of the largest entry, or 1e-5 itself."""
    scale = max(1.0, max(g.abs().max().item() for g in expected))
    assert max(g.abs().max().item()
               for g in expected) > 1e-3, "the reference has no gradient: nothing is tested"
    assert max((a - b).abs().max().item() for a, b in zip(ours, expected)) < 1e-5 * scale


# ---------------------------------------------------------------- item 1: both layouts are the
# stock model

@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_rewards_features_values_and_gradients_equal_the_stock_model(name, K, attention):
    model, groups = make(name, AutoModelForSequenceClassification), make_groups(K)
    reward_model = common.RewardModel(model)
    weights = torch.randn(len(groups), K,
                          generator=torch.Generator().manual_seed(1)).to(common.device())
    expected = stock_rewards(model, groups)
    expected_gradients = gradients(model, (weights * expected).mean())
    features = torch.stack([
        torch.stack([
            model.base_model(torch.tensor([g["prompt"] + r],
                                          device=common.device())).last_hidden_state[0, -1]
            for r in g["responses"]])
        for g in groups])
    assert expected.std() > 0.1  # rewards spread far wider than the tolerance
    for layout in ("shared", "separate"):
        batch = common.collate(groups, PAD, layout)
        rewards, h = reward_model(batch)
        assert_close(rewards, expected, atol=1e-5, rtol=1e-5)
        assert_close(h, features, atol=1e-5, rtol=1e-5)
        assert_same_gradients(gradients(model, (weights * rewards).mean()), expected_gradients)
        values, _ = reward_model(batch, values=True)
        expected_values = stock_values(model, groups, batch["mask"].shape[-1])
        assert_close(values * batch["mask"], expected_values * batch["mask"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_log_probabilities_and_gradients_equal_the_stock_model(name, K, attention):
    model, groups = make(name, AutoModelForCausalLM), make_groups(K, seed=1)
    expected = None
    for layout in ("shared", "separate"):
        batch = common.collate(groups, PAD, layout)
        if expected is None:
            expected = stock_logps(model, groups, batch["mask"].shape[-1])
            expected_gradients = gradients(model, expected.sum() / batch["mask"].sum())
        logps = common.token_logps(common.response_logits(model, batch),
                                   batch["response_ids"]) * batch["mask"]
        assert_close(logps, expected, atol=1e-5, rtol=1e-5)
        assert_same_gradients(gradients(model,
                                        logps.sum() / batch["mask"].sum()), expected_gradients)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_that_takes_the_mask_gets_the_shared_layout(name):
    reward_model = common.RewardModel(make(name, AutoModelForSequenceClassification))
    policy, groups = make(name, AutoModelForCausalLM), make_groups(2)
    assert common.choose_layout(ARGS, lambda batch: reward_model(batch)[0], groups) == "shared"
    assert common.choose_layout(ARGS, lambda batch: common.token_logps(
        common.response_logits(policy, batch), batch["response_ids"])[..., 0], groups) == "shared"


@pytest.mark.parametrize("name", CANNOT)
def test_a_model_that_cannot_is_detected_and_right_in_the_fallback(name, capsys):
    model, groups = make(name, AutoModelForSequenceClassification), make_groups(2)
    reward_model = common.RewardModel(model)
    layout = common.choose_layout(ARGS, lambda batch: reward_model(batch)[0], groups)
    assert layout == "separate"
    assert capsys.readouterr().out.count("\n") == 1  # one logged line
    with torch.no_grad():
        assert_close(
            reward_model(common.collate(groups, PAD, layout))[0], stock_rewards(model, groups),
            atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CANNOT)
def test_log_probabilities_in_the_fallback(name):
    policy, groups = make(name, AutoModelForCausalLM), make_groups(2)
    batch = common.collate(groups, PAD, "separate")
    with torch.no_grad():
        logps = common.token_logps(common.response_logits(policy, batch),
                                   batch["response_ids"]) * batch["mask"]
        assert_close(logps, stock_logps(policy, groups, logps.shape[-1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_rewards_that_are_no_numbers_are_an_error(broken, capsys):
    """Not a tie, not the reason for another layout: in the probe, and later on a long row only."""
    model, groups = make("gpt2", AutoModelForSequenceClassification), make_groups(2)
    reward_model = common.RewardModel(model)
    with torch.no_grad():
        longest = {g["id"]: len(g["prompt"]) + max(map(len, g["responses"])) for g in groups}
        place = max(longest.values()) - 1
        model.transformer.wpe.weight[place] = broken
    for call in (
            lambda: common.choose_layout(ARGS, lambda batch: reward_model(batch)[0], groups),
            lambda: common.score(reward_model, groups, ARGS, "separate", PAD),
            lambda: common.score(reward_model, groups, ARGS, "shared", PAD)):
        with pytest.raises(SystemExit) as stop:
            call()
        assert stop.value.code == 2
        assert "of the model are not finite" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        common.finite(torch.tensor([1.0, -broken]))
    few = [g for g in groups if longest[g["id"]] <= place]
    assert len(few) > 1 and common.score(reward_model, few, ARGS, "shared", PAD).isfinite().all()


def test_the_probe_looks_at_the_longest_rows(monkeypatch):
    """Only rows longer than a sliding window show that a layout loses it, as it is made to here."""
    rows_of = attend.rows_of
    monkeypatch.setattr(attend, "rows_of", lambda lengths, _, device: rows_of(lengths, 0, device))
    reward_model = common.RewardModel(make("mistral_window", AutoModelForSequenceClassification))
    # at most 5 tokens of prompt and response: inside the window
    short = make_groups(2, n=64, longest=2)
    long = [{
        "id": "long", "prompt": list(range(2, 40)), "responses": [[40, 41, EOS], [42, 43, EOS]]}]
    assert common.choose_layout(ARGS, lambda batch: reward_model(batch)[0],
                                short + long) == "separate"


def test_a_layout_given_by_hand_is_kept():
    def never(batch):
        raise AssertionError("probed")
    for layout in ("shared", "separate"):
        assert common.choose_layout(SimpleNamespace(layout=layout), never, []) == layout


@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_score_alone_equals_the_score_in_a_batch(name, layout):
    reward_model, groups = common.RewardModel(make(
        name, AutoModelForSequenceClassification)), make_groups(4, n=6)
    with torch.no_grad():
        together = reward_model(common.collate(groups, PAD, layout))[0]
        for i, group in enumerate(groups):
            for k, response in enumerate(group["responses"]):
                alone = reward_model(
                    common.collate([{**group, "responses": [response]}], PAD, layout))[0]
                assert_close(alone[0, 0], together[i, k], atol=1e-5, rtol=1e-5)


def test_a_response_does_not_see_its_siblings(attention):
    """The gradient of reward k with respect to the tokens of another response is exactly zero."""
    model = make("llama", AutoModelForSequenceClassification)
    embedding = model.get_input_embeddings()
    group = {
        "id": "0", "prompt": [2, 3, 4], "responses": [[10, 11, EOS], [20, 21, 22, EOS], [30, EOS]]}
    rewards, _ = common.RewardModel(model)(common.collate([group], PAD, "shared"))
    gradient, = torch.autograd.grad(rewards[0, 1], embedding.weight)
    touched = gradient.abs().sum(-1) > 0
    assert touched[[2, 3, 4, 20, 21, 22]].all() and not touched[[10, 11, 30]].any()


def test_the_pad_id_does_not_matter():
    """Even a pad equal to EOS, or to a token of the text: nothing is looked up by id."""
    reward_model, groups = common.RewardModel(make(
        "llama", AutoModelForSequenceClassification)), make_groups(2)
    with torch.no_grad():
        for layout in ("shared", "separate"):
            scores = [reward_model(common.collate(groups, pad, layout))[0] for pad in (PAD, EOS, 7)]
            assert_close(scores[1], scores[0], atol=1e-6, rtol=1e-6)
            assert_close(scores[2], scores[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("order", [1, -1])
def test_a_margin_that_only_some_pairs_bring_is_left_out(order):
    """Stages that use it write it for every pair; the others took the first pair's for all."""
    groups = make_groups(2, n=3)[::order]
    groups[0]["margin"] = 0.5
    assert "margin" not in common.collate(groups[::order], PAD)
    whole = common.collate([g | {"margin": 0.5} for g in groups], PAD)
    assert whole["margin"].tolist() == [0.5] * 3


@pytest.fixture
def process_group(tmp_path):
    """A group of one, for the functions that gather over ranks."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0,
                                         world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_score_returns_rewards_in_the_order_of_the_groups(process_group):
    model, groups = make("gpt2", AutoModelForSequenceClassification), make_groups(2, n=11)
    model.train()
    rewards, h = common.score(common.RewardModel(model), groups, ARGS, "shared", PAD, features=True)
    model.eval()
    with torch.no_grad():
        assert_close(rewards, stock_rewards(model, groups).cpu(), atol=1e-5, rtol=1e-5)
        assert_close(
            model.score(h.to(common.device())).squeeze(-1).cpu(), rewards, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- batches and micro batches

def ids(batches):
    return [[g["id"] for g in batch] for batch in batches]


@pytest.mark.parametrize("n, size, epochs", [(64, 4, 3), (40, 8, 2), (7, 7, 2), (3, 1, 4)])
def test_every_epoch_covers_all_rows(n, size, epochs):
    groups = make_groups(2, n=n)
    counts = {}
    for batch in ids(common.batches(groups, size, epochs * n // size, seed=1)):
        assert len(batch) == size
        for i in batch:
            counts[i] = counts.get(i, 0) + 1
    assert counts == {str(i): epochs for i in range(n)}


def test_a_part_of_an_epoch_never_repeats_a_row():
    """13 batches of 8 from 40 rows: two epochs and 24 rows of the third; rows come 2 or 3 times."""
    order = sum(ids(common.batches(make_groups(2, n=40), 8, 13, seed=0)), [])
    counts = [order.count(str(i)) for i in range(40)]
    assert len(order) == 104 and sorted(counts) == [2] * 16 + [3] * 24


def test_batches_depend_on_the_seed_and_not_on_the_rank(monkeypatch):
    groups, orders = make_groups(2, n=48), []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank)), monkeypatch.setenv("WORLD_SIZE", "2")
        random.seed(rank), torch.manual_seed(rank)
        orders.append(ids(common.batches(groups, 8, 12, seed=5)))
    assert orders[0] == orders[1] != ids(common.batches(groups, 8, 12, seed=6))
    assert orders[0][:6] != sorted(orders[0][:6]) and sum(orders[0][:6], []) != sum(
        orders[0][6:], [])


def test_batches_are_sorted_by_length_inside_a_window():
    """Less padding than random batches; the batches themselves are in random order."""
    groups = make_groups(2, n=128, longest=40)
    found = list(common.batches(groups, 8, 16, seed=0))
    lengths = [[common.group_length(g) for g in batch] for batch in found]
    ordered = sorted(lengths, key=lambda x: x[0])
    assert all(x == sorted(x) for x in lengths) and lengths != ordered
    assert all(a[-1] <= b[0] for a, b in zip(ordered, ordered[1:]))


def test_micro_batches_share_a_batch_out(monkeypatch):
    batch, seen = list(range(24)), []
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        micros = common.micro_batches(batch, 4)
        assert [len(m) for m in micros] == [4, 4]
        seen += sum(micros, [])
    assert sorted(seen) == batch
    assert [len(m) for m in common.micro_batches(batch, 100)] == [8]  # never larger than the share


@pytest.mark.parametrize("size, world, micro", [(10, 3, 2), (12, 2, 4)])
def test_an_uneven_split_stops_the_run(monkeypatch, capsys, size, world, micro):
    monkeypatch.setenv("WORLD_SIZE", str(world)), monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as stop:
        common.micro_batches(list(range(size)), micro)
    assert stop.value.code == 2 and "does not split evenly" in capsys.readouterr().err


# ---------------------------------------------------------------- encode

@pytest.fixture(scope="module")
def tokenizer():
    text = [
        "\n\nHuman: hello there, how do I bake bread?\n\nAssistant: Mix flour, water and yeast; "
        "wait and bake it."
    ]
    return import_module("01_sft").train_tokenizer(text * 3, VOCAB)


def with_special(text, before, after):
    """A tokenizer like the module's, whose template adds special tokens around the text."""
    tokenizer = import_module("01_sft").train_tokenizer([text], VOCAB)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    special = [(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([*before, "$A", *after]), special_tokens=special)
    return tokenizer


RUN = {"max_prompt_tokens": 1000, "max_response_tokens": 1000}
ROW = {
    "id": "a", "prompt": "\n\nHuman: how do I bake?\n\nAssistant:", "chosen": " Mix and wait.",
    "rejected": " No."}


def test_encode_gives_the_ids_of_stock_tools_and_forces_eos(tokenizer):
    group, = common.encode(tokenizer, [ROW], ("chosen", "rejected"), RUN)
    for response, key in zip(group["responses"], ("chosen", "rejected")):
        assert group["prompt"] + response == tokenizer(ROW["prompt"] + ROW[key])["input_ids"] + [
            EOS]
    assert tokenizer.decode(group["prompt"]) == ROW["prompt"] and group["id"] == "a"
    assert EOS != tokenizer.pad_token_id and tokenizer.eos_token_id == EOS


def test_encode_cuts_prompts_left_and_responses_right(tokenizer):
    whole, = common.encode(tokenizer, [ROW], ("chosen",), RUN)
    cut, = common.encode(tokenizer, [ROW], ("chosen",),
                         {"max_prompt_tokens": 5, "max_response_tokens": 4})
    assert cut["prompt"] == whole["prompt"][-5:] and len(whole["prompt"]) > 5
    assert cut["responses"] == [whole["responses"][0][:3] + [EOS]] and len(
        whole["responses"][0]) > 4


def test_encode_where_the_border_merges_tokens():
    """hel|lo is one token when read whole; then the response is tokenized by itself and the prompt
    kept."""
    tokenizer = import_module("01_sft").train_tokenizer(["hello there"] * 3, VOCAB)
    assert len(tokenizer("hello")["input_ids"]) == 1
    row = {"id": "b", "prompt": "hel", "response": "lo there"}
    group, = common.encode(tokenizer, [row], ("response",), RUN)
    assert group["prompt"] == tokenizer("hel")["input_ids"]
    assert group["responses"] == [tokenizer("lo there")["input_ids"] + [EOS]]


def test_encode_takes_lists_empty_texts_and_keeps_the_order(tokenizer):
    rows = [{"id": "0", "prompt": "bake", "r": [" it.", "", " Mix"]},
            {"id": "1", "prompt": "", "r": ["wait", " and", "a"]}]
    groups = common.encode(tokenizer, rows, ("r",), RUN)
    assert [[tokenizer.decode(r[:-1])
             for r in g["responses"]]
            for g in groups] == [row["r"] for row in rows]
    assert all(r[-1] == EOS
               for g in groups
               for r in g["responses"]) and groups[0]["responses"][1] == [EOS]
    assert groups[1]["prompt"] == [EOS]  # the first response token is predicted from something
    assert common.encode(tokenizer, rows, [], RUN)[0]["responses"] == []
    assert common.encode(tokenizer, [], ["r"], RUN) == []


@pytest.mark.parametrize("after", [[], ["</s>"]])
def test_encode_keeps_one_bos_and_no_eos_in_the_middle(after):
    tokenizer = with_special("hello there", ["<s>"], after)
    bos = tokenizer.bos_token_id
    row = {"id": "c", "prompt": "hello there hello", "response": " there you go"}
    for limit in (1000, 6):
        group, = common.encode(tokenizer, [row], ("response",), {**RUN, "max_prompt_tokens": limit})
        assert group["prompt"][0] == bos and len(group["prompt"]) <= limit
        both = group["prompt"] + group["responses"][0]
        assert both.count(bos) == 1 and both.count(EOS) == 1 and both[-1] == EOS
        plain = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        assert group["prompt"][1:] == plain[-(limit - 1):]
    row = {"id": "d", "prompt": "hel", "response": "lo"}  # tokenized apart: still one BOS
    group, = common.encode(tokenizer, [row], ("response",), RUN)
    assert (group["prompt"] + group["responses"][0]).count(bos) == 1


def test_encode_keeps_a_bos_that_is_also_eos():
    """OPT's tokenizer opens every text with </s>, which is its EOS too."""
    tokenizer = with_special("hello there", ["</s>"], [])
    row = {"id": "e", "prompt": "hello there hello", "response": " there"}
    group, = common.encode(tokenizer, [row], ("response",), {**RUN, "max_prompt_tokens": 4})
    assert group["prompt"][0] == EOS and len(group["prompt"]) == 4


def test_encode_pairs_drops_pairs_equal_after_truncation(tokenizer, capsys):
    rows = [ROW, {**ROW, "id": "same", "chosen": " Mix flour.", "rejected": " Mix water."}]
    first = len(tokenizer(" Mix")["input_ids"])
    kept, groups = common.encode_pairs(tokenizer, rows, {**RUN, "max_response_tokens": first + 1})
    assert [r["id"] for r in kept] == [g["id"] for g in groups] == ["a"]
    assert "dropped 1 of 2 pairs" in capsys.readouterr().out


# ---------------------------------------------------------------- item 2: saved models are stock
# checkpoints

@pytest.fixture
def saved_policy(tmp_path, tokenizer):
    """save(name, **config changes): a tiny random policy as stage 01 leaves it, with its
    tokenizer."""
    def save(name, **changes):
        model = make(name, AutoModelForCausalLM)
        # stock scoring needs the tokenizer's pad id
        for key, value in ({"pad_token_id": None} | changes).items():
            setattr(model.config, key, value)
        common.save_model(model, tmp_path / name, tokenizer)
        return model, tmp_path / name
    return save


def assert_safetensors_only(path):
    names = [p.name for p in path.iterdir()]
    assert "model.safetensors" in names and not [
        n for n in names if n.endswith((".bin", ".pt", ".pth", ".pkl"))]


@pytest.mark.parametrize("name", CONFIGS)
def test_stock_transformers_scores_a_saved_reward_model_the_same(name, saved_policy, tmp_path,
                                                                 tokenizer):
    _, policy = saved_policy(name)
    reward_model = common.load_reward_model(policy, ARGS, head_seed=3).eval()
    common.save_model(reward_model, tmp_path / "rm", tokenizer)
    assert_safetensors_only(tmp_path / "rm")
    stock, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm",
                                                                     output_loading_info=True)
    assert stock.config.num_labels == 1 and not info["missing_keys"] and not info["unexpected_keys"]
    stock_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    groups = make_groups(2, n=5)
    rows = stock_tokenizer.pad(
        {"input_ids": [g["prompt"] + r for g in groups for r in g["responses"]]},
        padding_side="right", return_tensors="pt")
    again = common.load_reward_model(tmp_path / "rm", ARGS).eval()
    with torch.no_grad():
        theirs = stock.eval()(rows["input_ids"],
                              attention_mask=rows["attention_mask"]).logits.view(5, 2)
        for layout in ("shared", "separate"):
            batch = {
                k: v.cpu() if torch.is_tensor(v) else v
                for k, v in common.collate(groups, PAD, layout).items()}
            assert_close(reward_model(batch)[0], theirs, atol=1e-4, rtol=0)
            # saved and loaded: bit for bit
            assert_close(again(batch)[0], reward_model(batch)[0], atol=0, rtol=0)
    assert theirs.std() > 0.1


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_policy_loads_in_stock_transformers(name, saved_policy):
    model, path = saved_policy(name)
    assert_safetensors_only(path)
    stock, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info[
        "unexpected_keys"] and stock.config.pad_token_id == PAD
    row = torch.tensor([make_groups(1)[1]["prompt"]])
    with torch.no_grad():
        expected = model.cpu()(row).logits
        assert_close(stock.eval()(row).logits, expected, atol=0, rtol=0)
        assert_close(common.load_policy(path, ARGS).eval()(row).logits, expected, atol=0, rtol=0)


def test_the_head_depends_on_its_seed_only(saved_policy):
    _, path = saved_policy("llama")
    heads = {}
    for seed in range(40):
        torch.manual_seed(seed % 7)
        heads[seed] = common.load_reward_model(path, ARGS,
                                               head_seed=seed).model.score.weight.detach().clone()
    torch.manual_seed(99)
    assert torch.equal(
        common.load_reward_model(path, ARGS, head_seed=0).model.score.weight, heads[0])
    assert not torch.equal(heads[0], heads[7])  # same global seed, other head
    weights = torch.cat(list(heads.values()))                                      # [40, 32]
    assert abs(weights.std().item() *
               (32 + 1)**0.5 - 1) < 0.08 and abs(weights.mean().item()) < 0.02


@pytest.mark.parametrize("name, switch", [("gpt2", "resid_pdrop"), ("neox", "hidden_dropout"),
                                          ("opt", "dropout")])
def test_dropout_is_off_unless_asked_for(name, switch, saved_policy):
    """GPT-2 and OPT drop by default. In training mode two passes are equal, but for stage 05's
    dropout."""
    _, path = saved_policy(name, **{switch: 0.3})
    assert getattr(transformers.AutoConfig.from_pretrained(path), switch) == 0.3
    values = common.load_config(path, "CausalLM").to_dict()
    found = {k: v for k, v in values.items() if "drop" in k and isinstance(v, float)}
    assert switch in found and set(found.values()) == {0.0}
    batch = {
        k: v.cpu() if torch.is_tensor(v) else v
        for k, v in common.collate(make_groups(2), PAD).items()}
    off = common.load_reward_model(path, ARGS, head_seed=0).train()
    assert torch.equal(off(batch)[0], off(batch)[0])
    policy = common.load_policy(path, ARGS).train()
    assert torch.equal(common.response_logits(policy, batch), common.response_logits(policy, batch))
    on = common.load_reward_model(path, ARGS, head_seed=0, dropout=0.05).train()
    assert not torch.equal(on(batch)[0], on(batch)[0])


def test_rewards_are_fp32_in_bf16(saved_policy):
    """bf16 has 8 bits: its scores would tie."""
    _, path = saved_policy("llama")
    model = common.load_reward_model(path, SimpleNamespace(precision="bf16"), head_seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    batch = {
        k: v.cpu() if torch.is_tensor(v) else v
        for k, v in common.collate(make_groups(2, n=40), PAD).items()}
    with torch.no_grad():
        rewards = model(batch)[0]
    assert rewards.dtype == torch.float32
    assert (rewards != rewards.bfloat16().float()).float().mean() > 0.9
