"""Answers to the exercises of lesson 2: cells to paste."""
# 2a
def strength(diffs):
    mu_hat = diffs.mean(0)
    return mu_hat, (diffs - mu_hat).square().mean(0).sqrt()

answer_2a = strength

# 2b
answer_2b = np.mean(gold[order[:round(0.2 * len(order))]] < 0)
