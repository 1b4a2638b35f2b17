"""Answers to the exercises of lesson 3: cells to paste."""
# 3a
def optimum(alpha, mu_hat):
    """sigma(d) = 1 - alpha at d = log((1 - alpha) / alpha), and r_c - r_r = d + mu_hat."""
    return np.log((1 - alpha) / alpha) + mu_hat

answer_3a = optimum

# 3b
answer_3b = np.mean([before["gold_chosen"] < before["gold_rejected"] for before, _ in changed])
