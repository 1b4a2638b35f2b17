"""Every pure function against a closed form or an independent rewrite in numpy, written from the
paper's equations."""
import math
import random
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import common

strength, denoise, contrastive = (import_module(n)
                                  for n in ("03_strength", "04_rm_denoise", "05_rm_contrastive"))
ppo, metarm, evaluate = (import_module(n) for n in ("06_ppo", "07_metarm", "08_evaluate"))

examples = settings(derandomize=True, deadline=None, max_examples=50)
seeds = st.integers(0, 2 ** 31 - 1)
MU = denoise.STRENGTH


def test_the_numbers_of_figure_11_do_not_depend_on_the_cores(tmp_path, monkeypatch):
    from threadpoolctl import threadpool_limits
    h = torch.randn(150, 2, 112, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(common, "score_by", lambda *a, **more: (None, h))
    run = SimpleNamespace(dir=tmp_path, args=SimpleNamespace(seed=0, tsne_pairs=150))
    found = set()
    for threads in (1, 2):
        with threadpool_limits(threads):
            contrastive.write_features(run, {"simcse": ""}, [{"id": i} for i in range(150)], None)
        found.add((tmp_path / "features.json").read_bytes())
    assert len(found) == 1


def test_the_overlap_of_one_pair_is_not_told():
    silhouette, told = contrastive.overlap(torch.randn(1, 2, 5))
    assert silhouette.shape == told.shape == (1, 2) and np.isnan([silhouette, told]).all()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For tensors this small a second thread only costs time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(seed, *shape, scale=1.0):
    """A float64 tensor of normal numbers that depends on the seed only."""
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape) * scale)


def np_sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, dtype=float)))


def prefix_mask(lengths, T):
    return torch.tensor([[t < n for t in range(T)] for n in lengths])


# ---------------------------------------------------------------- 03: Eq. 4

@examples
@given(seeds, st.integers(1, 10), st.integers(1, 8))
def test_preference_strength_is_mean_and_population_std(seed, M, N):
    diffs = normal(seed, M, N, scale=3)
    mu_hat, sigma_hat = strength.preference_strength(diffs)
    for i in range(N):
        d = [diffs[m, i].item() for m in range(M)]
        mean = sum(d) / M
        assert mu_hat[i].item() == pytest.approx(mean, abs=1e-12)
        assert sigma_hat[i].item() == pytest.approx(math.sqrt(sum((x - mean)**2 for x in d) / M),
                                                    abs=1e-12)


def test_preference_strength_of_one_model_has_no_spread():
    mu_hat, sigma_hat = strength.preference_strength(torch.tensor([[1.5, -2.0]]))
    assert mu_hat.tolist() == [1.5, -2.0] and sigma_hat.tolist() == [0.0, 0.0]


def test_scores_are_written_with_four_decimals():
    """Rounded in fp32, 0.12345 became 0.12349999696016312 in the file."""
    scores = normal(3, 2, 50, scale=3.0).tolist()
    rows = strength.annotate(None, [{"chosen_score_list": scores[0],
                                     "rejected_score_list": scores[1]}], None, None)
    for side in ("chosen", "rejected"):
        written = rows[0][f"{side}_score_list"]
        assert written == [round(x, 4) for x in written] and len(written) == 50


@pytest.mark.parametrize("n, count", [(100, 20), (103, 20), (5, 20), (1, 3)])
def test_by_strength_cuts_an_ascending_partition(n, count):
    rows = [{"id": i, strength.MEAN: x} for i, x in enumerate(normal(0, n).tolist())]
    groups = strength.by_strength(rows, count)
    assert [r for g in groups for r in g] == sorted(rows, key=lambda r: r[strength.MEAN])
    assert len(groups) == min(n, count) and max(map(len, groups)) - min(map(len, groups)) <= 1


def test_consistency_takes_the_weakest_the_middle_and_the_strongest_group():
    """Twelve verdicts on strengths -5.5 .. 5.5, groups of two; pairs without a verdict are out."""
    rows = [{strength.MEAN: i - 5.5, "judge_label": int(i > 6)} for i in range(12)]
    found = strength.consistency(
        rows + [{strength.MEAN: 9.0, "judge_label": -1}, {strength.MEAN: 0}], 2)
    assert (found["weakest"], found["near_zero"], found["strongest"]) == ([0, 0], [0, 0], [1, 1])
    assert found["groups"][:2] == [(-5.0, 0), (-3.0, 0)] and len(found["groups"]) == 6
    assert strength.consistency(rows, 500)["group_size"] == 4  # no more than a third
    assert strength.consistency([{strength.MEAN: 1.0}], 2) == {}


# ---------------------------------------------------------------- 04: Eqs. 2, 5, 6

@examples
@given(seeds, st.integers(1, 9), st.booleans(), st.booleans())
def test_preference_loss_with_margin_and_smoothing_together(seed, B, scalar_margin,
                                                            scalar_smoothing):
    """-[(1 - a) log sigma(d - mu) + a log sigma(mu - d)], mean; -log sigma(x) = log(1 + e^-x)."""
    rng = np.random.default_rng(seed)
    r_c, r_r = rng.normal(size=(2, B)) * 4
    mu = float(rng.normal()) if scalar_margin else rng.normal(size=B)
    alpha = float(rng.random()) if scalar_smoothing else rng.random(B)
    d = r_c - r_r - mu
    expected = np.mean((1 - alpha) * np.logaddexp(0, -d) + alpha * np.logaddexp(0, d))
    tensors = [x if isinstance(x, float) else torch.from_numpy(x) for x in (r_c, r_r, mu, alpha)]
    loss = denoise.preference_loss(*tensors)
    assert loss.shape == () and loss.item() == pytest.approx(expected, rel=1e-9)


def test_preference_loss_closed_forms():
    one, three = torch.tensor([1.0]), torch.tensor([3.0])
    # Eq. 2
    assert denoise.preference_loss(one, one).item() == pytest.approx(math.log(2))
    # Eq. 2
    assert denoise.preference_loss(three, one).item() == pytest.approx(math.log(1 + math.exp(-2)))
    # Eq. 6
    assert denoise.preference_loss(three, one, margin=2.0).item() == pytest.approx(math.log(2))
    # Eq. 5
    assert denoise.preference_loss(three, one, smoothing=0.1).item() == pytest.approx(
        0.9 * math.log(1 + math.exp(-2)) + 0.1 * math.log(1 + math.exp(2)), rel=1e-6)
    batch = denoise.preference_loss(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0])).item()
    # mean, not sum
    assert batch == pytest.approx((math.log(2) + math.log(1 + math.exp(-2))) / 2, rel=1e-6)


@examples
@given(seeds)
def test_smoothing_one_half_does_not_know_which_is_chosen(seed):
    a, b = normal(seed, 2, 5)
    assert_close(denoise.preference_loss(a, b, smoothing=0.5),
                 denoise.preference_loss(b, a, smoothing=0.5))


def test_smoothing_alpha_is_the_wrong_label_with_weight_alpha():
    a, b = normal(0, 2, 5)
    mixed = 0.7 * denoise.preference_loss(a, b) + 0.3 * denoise.preference_loss(b, a)
    assert_close(denoise.preference_loss(a, b, smoothing=0.3), mixed)


@pytest.mark.parametrize("d", [1e4, -1e4, 200.0, -200.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_preference_loss_is_finite_and_exact_for_large_differences(d, smoothing):
    r = torch.tensor([d], requires_grad=True)
    loss = denoise.preference_loss(r, torch.zeros(1), smoothing=smoothing)
    loss.backward()
    # -log sigma(x) = -x for x << 0, no cap near 11.5
    wrong = (1 - smoothing) * max(-d, 0) + smoothing * max(d, 0)
    assert loss.item() == pytest.approx(wrong, rel=1e-6)
    assert r.grad.item() == pytest.approx(smoothing if d > 0 else smoothing - 1, abs=1e-6)


def test_preference_loss_gradients():
    """d loss / d r_c = sigma(d) - (1 - alpha); r_r and the margin get minus that."""
    r_c, r_r, mu = (torch.tensor([x], dtype=torch.float64, requires_grad=True)
                    for x in (0.7, 0.2, 1.1))
    denoise.preference_loss(r_c, r_r, mu, 0.2).backward()
    expected = np_sigmoid(0.7 - 0.2 - 1.1) - 0.8
    assert r_c.grad.item() == pytest.approx(expected)
    assert r_r.grad.item() == mu.grad.item() == pytest.approx(-expected)


def strength_rows(values):
    return [{"id": i, "prompt": "p", "chosen": f"c{i}", "rejected": f"r{i}", MU: float(x)}
            for i, x in enumerate(values)]


@examples
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=40, unique=True),
       st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.booleans(), st.sampled_from([0.0, 0.1]))
def test_relabel_follows_its_three_rules(values, share, margin, smoothing):
    rows = strength_rows(values)
    out = denoise.relabel(rows, share, margin, smoothing)
    lowest = sorted(values)[:round(share * len(values))]
    for before, after in zip(rows, out, strict=True):
        mu, flip = before[MU], before[MU] in lowest and before[MU] < 0
        assert after["flipped"] == flip
        assert (after["chosen"], after["rejected"]) == ((before["rejected"],
                                                         before["chosen"]) if flip else
                                                        (before["chosen"], before["rejected"]))
        assert after["margin"] == ((-mu if flip else mu) if margin else 0.0)
        assert after["smoothing"] == (smoothing if mu < 0 else 0.0)
    assert rows == strength_rows(values)  # the input is not changed


def test_relabel_by_hand():
    """Ten pairs, the lowest 20 % flipped; where fewer are negative, fewer are flipped."""
    out = denoise.relabel(strength_rows([3, -2, 1, -5, 0, 2, -1, 4, 5, 6]), flip_below=0.2,
                          margin=True, smoothing=0.1)
    assert [r["id"] for r in out if r["flipped"]] == [1, 3]
    assert [r["margin"] for r in out] == [3, 2, 1, 5, 0, 2, -1, 4, 5, 6]
    assert [r["id"] for r in out if r["smoothing"]] == [1, 3, 6]
    assert (out[3]["chosen"], out[3]["rejected"]) == ("r3", "c3")
    assert not any(r["flipped"] for r in denoise.relabel(strength_rows(range(10)), flip_below=0.5))
    soft = denoise.relabel(strength_rows([3, -2]), smoothing=0.1, soften_all=True)
    assert [r["smoothing"] for r in soft] == [0.1, 0.1]


@examples
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=60, unique=True),
       st.sampled_from([5, 10, 20, 25, 50]))
def test_percentile_slices_partition_the_rows_by_strength(values, step):
    rows = strength_rows(values)
    slices = [denoise.percentile_slice(rows, low, low + step) for low in range(0, 100, step)]
    assert sorted(r["id"] for s in slices for r in s) == list(range(len(rows)))
    # original order inside
    assert all([r["id"] for r in s] == sorted(r["id"] for r in s) for s in slices)
    ends = [(min(r[MU] for r in s), max(r[MU] for r in s)) for s in slices if s]
    assert all(a[1] < b[0] for a, b in zip(ends, ends[1:]))


def test_percentile_slice_by_hand():
    rows = strength_rows([5, 1, 4, 2, 3, 9, 8, 7, 6, 0])
    assert [r[MU] for r in denoise.percentile_slice(rows, 0, 20)] == [1, 0]
    assert [r[MU] for r in denoise.percentile_slice(rows, 90, 100)] == [9]
    assert denoise.percentile_slice(rows, 0, 100) == rows


def test_accuracies_on_the_three_sets():
    """Original: every pair as labelled. Judge: label 0 inverts, -1 or none is left out. Consistent:
    label 1 only."""
    rows = [{"judge_label": 1}, {"judge_label": 0}, {"judge_label": 0}, {"judge_label": -1}, {},
            {"judge_label": 1}]
    rewards = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    result = common.accuracies(rewards, rows)
    assert result == {
        "accuracy_original": 3 / 6, "accuracy_judge": 2 / 4, "accuracy_consistent": 1 / 2}


def test_a_tie_counts_as_wrong_for_both_labels():
    rows = [{"judge_label": 1}, {"judge_label": 0}]
    assert set(common.accuracies(torch.ones(2, 2), rows).values()) == {0.0}
    assert common.accuracies(torch.tensor([[1.0, 0.0]]), [{}]) == {"accuracy_original": 1.0}


# ---------------------------------------------------------------- 05: Eqs. 7, 8, 9 and Sinkhorn

def np_unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def np_log_softmax(x):
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(
        -1, keepdims=True)


@examples
@given(seeds, st.integers(1, 12), st.sampled_from([0.05, 0.5, 1.0]))
def test_simcse_loss(seed, N, tau):
    s, t = normal(seed, N, 6), normal(seed + 1, N, 6)
    total = 0.0
    for i in range(N):
        sims = [float(s[i] @ t[j] / (s[i].norm() * t[j].norm())) / tau for j in range(N)]
        total += math.log(sum(math.exp(x - sims[i]) for x in sims))
    assert contrastive.simcse_loss(s, t, tau).item() == pytest.approx(total / N, rel=1e-9,
                                                                      abs=1e-12)


def test_simcse_closed_forms():
    # one sample has no negative
    assert contrastive.simcse_loss(normal(0, 1, 4), normal(1, 1, 4), 0.05).item() == 0.0
    h = normal(0, 1, 4).repeat(8, 1)
    # all features alike
    assert contrastive.simcse_loss(h, h, 0.05).item() == pytest.approx(math.log(8))
    eye = torch.eye(5)  # orthogonal features, equal views
    assert contrastive.simcse_loss(eye, eye,
                                   0.5).item() == pytest.approx(math.log(1 + 4 * math.exp(-2)),
                                                                rel=1e-6)


@examples
@given(seeds)
def test_simcse_is_blind_to_the_scale_of_features(seed):
    s, t = normal(seed, 5, 4), normal(seed + 1, 5, 4)
    scales = normal(seed + 2, 5, 1).exp()
    assert_close(contrastive.simcse_loss(s * scales, t * 7, 0.05),
                 contrastive.simcse_loss(s, t, 0.05))


def np_sinkhorn(scores, epsilon, iterations):
    """As published with SwAV: Q is [K, N]; rows then columns, each round."""
    Q = np.exp(np.asarray(scores, dtype=float) / epsilon).T
    Q /= Q.sum()
    K, N = Q.shape
    for _ in range(iterations):
        Q /= Q.sum(axis=1, keepdims=True) * K
        Q /= Q.sum(axis=0, keepdims=True) * N
    return (Q * N).T


@examples
@given(seeds, st.integers(1, 12), st.integers(1, 12), st.integers(1, 5))
def test_sinkhorn(seed, N, K, iterations):
    """Any shape, N < K included, scores over the whole range of a cosine."""
    scores = normal(seed, N, K).clamp(-1, 1)
    codes = contrastive.sinkhorn(scores, 0.05, iterations)
    assert_close(codes.double(), torch.from_numpy(np_sinkhorn(scores, 0.05, iterations)), atol=1e-5,
                 rtol=1e-4)
    assert_close(codes.sum(1), torch.ones(N))


@pytest.mark.parametrize("N, K", [(40, 5), (12, 12), (4, 10)])
def test_sinkhorn_uses_all_prototypes_equally_in_the_limit(N, K):
    codes = contrastive.sinkhorn(normal(0, N, K, scale=0.2), 0.05, 500)
    assert_close(codes.sum(0), torch.full((K,), N / K), atol=1e-3, rtol=1e-3)
    assert_close(codes.sum(1), torch.ones(N))


def test_sinkhorn_has_no_gradient_and_is_fp32():
    scores = normal(0, 4, 3).bfloat16().requires_grad_()
    codes = contrastive.sinkhorn(scores, 0.05, 3)
    assert not codes.requires_grad and codes.dtype == torch.float32


def np_swav(s, t, c, tau, epsilon, iterations):
    s, t, c = np_unit(s), np_unit(t), np_unit(c)
    q_s, q_t = np_sinkhorn(s @ c.T, epsilon, iterations), np_sinkhorn(t @ c.T, epsilon, iterations)
    return -(q_s * np_log_softmax(t @ c.T / tau)).sum(-1).mean() - (
        q_t * np_log_softmax(s @ c.T / tau)).sum(-1).mean()


@examples
@given(seeds, st.integers(1, 10), st.integers(1, 8))
def test_swav_loss(seed, N, K):
    s, t, c = normal(seed, N, 5), normal(seed + 1, N, 5), normal(seed + 2, K, 5)
    loss = contrastive.swav_loss(s, t, c, 0.1, 0.05, 3)
    assert loss.item() == pytest.approx(np_swav(*(x.numpy() for x in (s, t, c)), 0.1, 0.05, 3),
                                        rel=1e-4, abs=1e-6)
    assert_close(contrastive.swav_loss(t, s, c, 0.1, 0.05, 3), loss)  # the views can change places
    # normalised inside
    assert_close(contrastive.swav_loss(3 * s, t, 5 * c, 0.1, 0.05, 3), loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("K", [2, 7])
def test_swav_with_identical_prototypes_is_two_ln_k(K):
    """Collapse: every code is uniform, each of the two terms is ln K."""
    loss = contrastive.swav_loss(normal(0, 6, 5), normal(1, 6, 5),
                                 normal(2, 1, 5).repeat(K, 1), 0.1, 0.05, 3)
    assert loss.item() == pytest.approx(2 * math.log(K), rel=1e-5)


def test_swav_gradient_does_not_flow_through_the_codes():
    """The gradient is that of the same loss with the codes as given numbers."""
    s, t, c = (normal(i, n, 5).requires_grad_() for i, n in enumerate((6, 6, 4)))
    ours = torch.autograd.grad(contrastive.swav_loss(s, t, c, 0.1, 0.05, 3), (s, t, c))
    unit = [x / x.norm(dim=-1, keepdim=True) for x in (s, t, c)]
    scores = [x @ unit[2].T for x in unit[:2]]
    q = [torch.from_numpy(np_sinkhorn(x.detach(), 0.05, 3)) for x in scores]
    terms = [(torch.logsumexp(scores[i] / 0.1, -1) - (q[1 - i] * scores[i] / 0.1).sum(-1)).mean()
             for i in (0, 1)]
    for a, b in zip(ours, torch.autograd.grad(sum(terms), (s, t, c))):
        assert b.abs().max() > 1e-3
        assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_contrastive_features_are_the_set_h():
    h = normal(0, 3, 2, 4).float()
    assert torch.equal(contrastive.contrastive_features(h, False), torch.cat([h[:, 0], h[:, 1]]))
    assert torch.equal(contrastive.contrastive_features(h, True),
                       torch.cat([h[:, 0] - h[:, 1], h[:, 1] - h[:, 0]]))


# ---------------------------------------------------------------- 06: PPO

def np_gae(rewards, values, lengths, gamma, lam):
    """A_t = sum over l >= t of (gamma lam)^(l - t) delta_l, by the double sum."""
    A = np.zeros(rewards.shape)
    for b, n in enumerate(lengths):
        delta = [
            rewards[b, t] + gamma * (values[b, t + 1] if t + 1 < n else 0.0) - values[b, t]
            for t in range(n)]
        for t in range(n):
            A[b, t] = sum((gamma * lam) ** (m - t) * delta[m] for m in range(t, n))
    return A


@examples
@given(seeds, st.sampled_from([0.0, 0.9, 1.0]), st.sampled_from([0.0, 0.95, 1.0]),
       st.lists(st.integers(0, 7), min_size=1, max_size=5))
def test_gae_is_the_double_sum(seed, gamma, lam, lengths):
    """Rows of any length, rows without a token too; what stands outside the mask is never read."""
    rewards, values, mask = normal(seed, len(lengths), 7), normal(seed + 1, len(lengths),
                                                                  7), prefix_mask(lengths, 7)
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    expected = torch.from_numpy(np_gae(rewards.numpy(), values.numpy(), lengths, gamma, lam))
    assert_close(advantages, expected)
    assert_close(returns, (expected + values) * mask)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


@examples
@given(seeds)
def test_gae_does_not_depend_on_padding(seed):
    rewards, values, mask = normal(seed, 3, 6), normal(seed + 1, 3, 6), prefix_mask([6, 2, 0], 6)
    longer = [
        torch.cat([x, garbage], 1) for x, garbage in ((rewards, normal(seed + 2, 3, 4, scale=100)),
                                                      (values, normal(seed + 3, 3, 4, scale=100)))]
    padded = ppo.gae(*longer, torch.cat([mask, torch.zeros(3, 4, dtype=torch.bool)], 1), 0.9, 0.95)
    for short, long in zip(ppo.gae(rewards, values, mask, 0.9, 0.95), padded):
        assert torch.equal(short, long[:, :6]) and (long[:, 6:] == 0).all()


def test_gae_edges():
    """lam = 1: returns are the discounted rewards to go, whatever V says. lam = 0: the one-step
    error."""
    rewards, values, mask = normal(0, 1, 5), normal(1, 1, 5), prefix_mask([5], 5)
    _, returns = ppo.gae(rewards, values, mask, 1.0, 1.0)
    assert_close(returns, rewards.flip(1).cumsum(1).flip(1))
    advantages, _ = ppo.gae(rewards, values, mask, 0.5, 0.0)
    next_values = torch.cat([values[:, 1:], torch.zeros(1, 1)], 1)
    assert_close(advantages, rewards + 0.5 * next_values - values)
    advantages, _ = ppo.gae(rewards, values, mask, 0.0, 0.95)
    assert_close(advantages, rewards - values)


@examples
@given(seeds, st.sampled_from([0.1, 0.2]))
def test_policy_loss_by_loops(seed, clip):
    rng = np.random.default_rng(seed)
    logp, old, A = (torch.from_numpy(rng.normal(size=(3, 2, 5)) * s) for s in (0.3, 0.3, 1.0))
    mask = torch.from_numpy(rng.random((3, 2, 5)) < 0.7)
    mask[0] = False  # a group of which nothing counts
    terms = []
    for i in np.ndindex(*mask.shape):
        if mask[i]:
            ratio = math.exp(logp[i] - old[i])
            terms.append(-min(ratio * A[i].item(),
                              min(max(ratio, 1 - clip), 1 + clip) * A[i].item()))
    assert ppo.policy_loss(logp, old, A, mask, clip).item() == pytest.approx(
        sum(terms) / len(terms) if terms else 0.0, rel=1e-9)


@pytest.mark.parametrize("ratio, advantage, moves", [(1.0, 1.0, True), (1.1, 1.0, True),
                                                     (1.5, 1.0, False), (1.5, -1.0, True),
                                                     (0.5, 1.0, True), (0.5, -1.0, False)])
def test_policy_gradient_is_zero_exactly_where_clipped(ratio, advantage, moves):
    logp = torch.tensor([[math.log(ratio), 0.3]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    ppo.policy_loss(logp, torch.zeros(1, 2), torch.tensor([[advantage, 5.0]]), mask, 0.2).backward()
    assert logp.grad[0, 0].item() == pytest.approx(-ratio * advantage if moves else 0.0, abs=1e-6)
    assert logp.grad[0, 1] == 0.0  # outside the mask


def test_policy_loss_at_the_old_policy_is_minus_the_mean_advantage():
    logp, A, mask = normal(0, 2, 3, 4), normal(1, 2, 3, 4), torch.ones(2, 3, 4)
    assert_close(ppo.policy_loss(logp, logp.clone(), A, mask, 0.2), -A.mean())


@examples
@given(seeds, st.sampled_from([0.1, 0.5]))
def test_value_loss_by_loops(seed, clip):
    rng = np.random.default_rng(seed)
    V, old, R = (torch.from_numpy(rng.normal(size=(4, 6))) for _ in range(3))
    mask = torch.from_numpy(rng.random((4, 6)) < 0.6)
    mask[0] = False
    terms = []
    for i in np.ndindex(*mask.shape):
        if mask[i]:
            near = min(max(V[i].item(), old[i].item() - clip), old[i].item() + clip)
            terms.append(0.5 * max((V[i].item() - R[i].item()) ** 2, (near - R[i].item()) ** 2))
    assert ppo.value_loss(V, old, R, mask, clip).item() == pytest.approx(
        sum(terms) / len(terms) if terms else 0.0, rel=1e-9)


@pytest.mark.parametrize("value, target, moves", [(0.1, 1.0, True), (0.5, 1.0, False),
                                                  (0.5, -1.0, True), (-0.5, -1.0, False),
                                                  (-0.5, 1.0, True)])
def test_value_gradient_is_zero_exactly_where_clipping_is_the_worse(value, target, moves):
    """Old value 0, clip 0.2: a value that has already moved towards its target by more than 0.2
    stops."""
    V = torch.tensor([[value]], requires_grad=True)
    ppo.value_loss(V, torch.zeros(1, 1), torch.tensor([[target]]), torch.ones(1, 1), 0.2).backward()
    assert V.grad.item() == pytest.approx(value - target if moves else 0.0, abs=1e-6)


def test_losses_of_no_token_are_zero_with_zero_gradient():
    x, nothing = normal(0, 2, 3).requires_grad_(), torch.zeros(2, 3, dtype=torch.bool)
    loss = ppo.policy_loss(x, torch.zeros(2, 3), normal(1, 2, 3), nothing, 0.2) + \
        ppo.value_loss(x, torch.zeros(2, 3), normal(2, 2, 3), nothing, 0.2)
    loss.backward()
    assert loss.item() == 0.0 and (x.grad == 0).all()


@examples
@given(seeds, st.integers(-3, 3))
def test_whiten(seed, shift):
    """Mean 0 and population std 1 over the masked entries of all tensors together, exact zeros
    elsewhere."""
    tensors = [normal(seed, 2, 3, 4) + shift, 5 * normal(seed + 1, 1, 3, 6)]
    rng = np.random.default_rng(seed)
    masks = [torch.from_numpy(rng.random(t.shape) < 0.6) for t in tensors]
    masks[0][0] = False
    inside = np.concatenate([t[m].numpy() for t, m in zip(tensors, masks)])
    for out, t, m in zip(ppo.whiten(tensors, masks), tensors, masks, strict=True):
        assert_close(out[m], (t[m] - inside.mean()) / inside.std(), atol=1e-6, rtol=1e-5)
        assert (out[~m] == 0).all() and out.shape == t.shape


def test_whiten_keeps_the_type_and_takes_constants():
    out, = ppo.whiten([torch.full((2, 3), 2.5)], [torch.ones(2, 3, dtype=torch.bool)])
    assert out.dtype == torch.float32 and (out.abs() < 1e-3).all()
    out, = ppo.whiten([torch.tensor([[2.0, 7.0]])], [torch.tensor([[True, False]])])
    assert out.tolist() == [[0.0, 0.0]]


def test_whiten_of_no_token_is_zero():
    out, = ppo.whiten([normal(0, 2, 3)], [torch.zeros(2, 3, dtype=torch.bool)])
    assert (out == 0).all()


def test_whiten_of_fp32_far_from_zero():
    """The sums are taken in double: squares of fp32 numbers near 100 would lose a spread of
    0.01."""
    t = (100 + normal(0, 8, 4, 50, scale=0.01)).float()
    out, = ppo.whiten([t], [torch.ones_like(t, dtype=torch.bool)])
    assert out.std(correction=0).item() == pytest.approx(1.0, abs=1e-3) and abs(
        out.mean().item()) < 1e-2


@examples
@given(seeds, st.lists(st.integers(1, 20), min_size=1, max_size=4))
def test_update_running_is_mean_and_population_std_of_all_so_far(seed, sizes):
    running, seen = (0, 0.0, 0.0), []
    for i, n in enumerate(sizes):
        values = (3 + 2 * normal(seed + i, n)).tolist()
        seen += values
        running, mean, std = ppo.update_running(running, values)
        assert running[0] == len(seen) and mean == pytest.approx(np.mean(seen), rel=1e-9)
        assert std == pytest.approx(max(np.std(seen), 1e-6), rel=1e-6)


def test_update_running_of_equal_scores_has_a_floor():
    assert ppo.update_running((0, 0.0, 0.0), [2.0, 2.0])[1:] == (2.0, 1e-6)


@examples
@given(seeds, st.sampled_from([0.0, 0.05]))
def test_shape_rewards_by_loops(seed, kl_beta):
    """Eq. 3: -beta (log pi - log pi_SFT) on every token, the score on the last; a cut response pays
    after the clip."""
    rng = np.random.default_rng(seed)
    args = SimpleNamespace(reward_clip=0.8, missing_eos_penalty=1.5, kl_beta=kl_beta)
    lengths = rng.integers(1, 6, size=(2, 3))
    e = {
        "logps": normal(seed, 2, 3, 5), "ref_logps": normal(seed + 1, 2, 3, 5),
        "scores": 2 * normal(seed + 2, 2, 3), "cut": torch.from_numpy(rng.random((2, 3)) < 0.5),
        "mask": torch.from_numpy(np.arange(5) < lengths[..., None])}
    rewards = ppo.shape_rewards(e, 0.3, 1.7, args)
    expected = np.zeros((2, 3, 5))
    for b, k in np.ndindex(2, 3):
        for t in range(lengths[b, k]):
            expected[b, k, t] = -kl_beta * (e["logps"][b, k, t] - e["ref_logps"][b, k, t])
        score = min(max(
            (e["scores"][b, k].item() - 0.3) / 1.7, -0.8), 0.8) - (1.5 if e["cut"][b, k] else 0.0)
        expected[b, k, lengths[b, k] - 1] += score
    assert_close(rewards, torch.from_numpy(expected))


def test_for_reward_ends_every_response_once_as_the_reward_model_reads_it():
    class Tokenizer:
        eos_token_id = 1

        def __call__(self, text, add_special_tokens):
            return {"input_ids": {"</s>.": [1, 9], "#": [8], "": []}[text]}
    def ended(end, form="chat"):
        return common.for_reward([[5, 1], [5, 6], [5, 8, 1]], Tokenizer(),
                                 {"form": form, "end": end})
    assert ended("", "hh") == [[5, 1], [5, 6, 1], [5, 8, 1]]
    assert ended("</s>.") == [[5, 1, 9], [5, 6, 1, 9], [5, 8, 1, 9]]  # EOS, and what follows it
    assert ended("#") == [[5, 8], [5, 6, 8], [5, 8]]  # no EOS in the template: a policy adds it
    assert ended("") == [[5], [5, 6], [5, 8]]


@examples
@given(seeds, st.sampled_from([0.5, 1.0, 2.0]))
def test_token_logps(seed, temperature):
    logits, rng = normal(seed, 2, 3, 7, scale=3), np.random.default_rng(seed)
    ids = torch.from_numpy(rng.integers(0, 7, size=(2, 3)))
    found = common.token_logps(logits, ids, temperature)
    for i in np.ndindex(2, 3):
        x = logits[i].numpy() / temperature
        assert found[i].item() == pytest.approx(x[ids[i]] - math.log(np.exp(x).sum()), rel=1e-9)


# ---------------------------------------------------------------- 07: Eq. 11

@examples
@given(seeds, st.integers(1, 5), st.integers(1, 6))
def test_difference_loss_by_loops_with_its_bounds(seed, m, k):
    """2/k^2 sum_{i<j} sigma(|r_i - r_j|), mean over prompts, between (k - 1) / 2k and (k - 1) /
    k."""
    r = normal(seed, m, k, scale=3)
    J = metarm.difference_loss(r).item()
    loops = [
        2 / k**2 *
        sum(np_sigmoid(abs(r[p, i].item() - r[p, j].item()))
            for i in range(k)
            for j in range(i))
        for p in range(m)]
    assert J == pytest.approx(sum(loops) / m, abs=1e-12)
    assert (k - 1) / (2 * k) - 1e-12 <= J <= (k - 1) / k + 1e-12
    order = torch.from_numpy(np.random.default_rng(seed).permutation(k))
    assert metarm.difference_loss(r[:, order]).item() == pytest.approx(J, abs=1e-12)
    assert metarm.difference_loss(r + 5).item() == pytest.approx(J, abs=1e-9)  # differences only


def test_difference_loss_of_one_response_is_zero():
    r = torch.ones(3, 1, requires_grad=True)
    J = metarm.difference_loss(r)
    J.backward()
    assert J.item() == 0.0 and (r.grad == 0).all()


@pytest.mark.parametrize("k", [2, 4, 7])
def test_difference_loss_of_equal_rewards_is_its_minimum_with_zero_gradient(k):
    r = torch.full((3, k), 1.7, requires_grad=True)
    J = metarm.difference_loss(r)
    J.backward()
    assert J.item() == pytest.approx((k - 1) / (2 * k)) and (r.grad == 0).all()


def test_difference_loss_of_far_rewards_is_its_maximum_with_finite_gradient():
    r = torch.tensor([[0.0, 1e4, -1e4, 3e4]], requires_grad=True)
    J = metarm.difference_loss(r)
    J.backward()
    assert J.item() == pytest.approx(3 / 4) and r.grad.isfinite().all()


def test_difference_loss_gradient_spreads_rewards():
    """k = 2: J = sigma(d) / 2, so dJ/dr_high = sigma(d)(1 - sigma(d)) / 2 and its opposite for the
    lower one."""
    r = torch.tensor([[0.3, -0.4]], dtype=torch.float64, requires_grad=True)
    metarm.difference_loss(r).backward()
    s = np_sigmoid(0.7)
    assert r.grad[0].tolist() == pytest.approx([s * (1 - s) / 2, -s * (1 - s) / 2])


# ---------------------------------------------------------------- 08: win, tie, lose

def test_verdicts_and_the_best_round():
    """Chosen on the prompts of even place, measured on the odd ones: round 1 leads on the even
    ones, round 2 on the odd ones; the first of equals is taken."""
    assert [evaluate.verdict(*x)
            for x in ((1.0, 0.5), (0.5, 1.0), (1.0, 1.0 + 1e-12))] == [1, -1, 0]
    scores = {"sft": [0.0] * 8, "round_0": [0.0] * 8, "round_1": [1.0, -1.0] * 4,
              "round_2": [-1.0, 1.0] * 4, "round_3": [1.0, 0.0] * 4}
    verdicts = {name: {p: {o: [*map(evaluate.verdict, x[at:at + 4], scores[o][at:at + 4])]
                           for o in ("sft", "round_0") if o != p}
                       for p, x in scores.items() if p != "sft"}
                for name, at in (("eval_harmless", 0), ("ood_harmless", 4))}
    assert verdicts["eval_harmless"]["round_1"] == {
        "sft": [1, -1, 1, -1], "round_0": [1, -1, 1, -1]}
    best, unseen = evaluate.best_rounds(verdicts)
    assert best == {"harmless": "round_1"}
    assert unseen == {"eval_harmless": [1, 3], "ood_harmless": [0, 1, 2, 3]}
    every, three = evaluate.tables(verdicts, best, unseen)
    assert len(every) == 2 * (1 + 3 * 2)
    found = {(r["set"], r["opponent"]): (r["win"], r["lose"], r["n"]) for r in three}
    assert found == {
        ("eval_harmless", "sft"): (0.0, 1.0, 2), ("eval_harmless", "round_0"): (0, 1, 2),
        ("ood_harmless", "sft"): (0.5, 0.5, 4), ("ood_harmless", "round_0"): (0.5, 0.5, 4)}


def test_compare_counts_shares():
    verdicts = [1] * 6 + [0] + [-1] * 3
    random.Random(0).shuffle(verdicts)
    found = evaluate.compare(verdicts)
    assert (found["n"], found["win"], found["tie"], found["lose"]) == (10, 0.6, 0.1, 0.3)
    for verdict, p in (("win", 0.6), ("lose", 0.3)):  # Wilson's own formula, n = 10
        z = 1.959963985
        middle, half = p + z**2 / 20, z * (p * (1 - p) / 10 + z**2 / 400) ** 0.5
        expected = [(middle + side * half) / (1 + z**2 / 10) for side in (-1, 1)]
        assert found[f"{verdict}_interval"] == pytest.approx(expected, abs=1e-6)
