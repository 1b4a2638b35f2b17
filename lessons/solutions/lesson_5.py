"""Answers to the exercises of lesson 5: cells to paste."""
# 5a
def kl(n):
    return np.log(n) - (n - 1) / n

answer_5a = kl

# 5b
A_3 = 1 - 0.5
A_2 = (0 + 0.5 - 0.5) + 0.95 * A_3
A_1 = (0 + 0.5 - 0.5) + 0.95 * A_2
answer_5b = [A_1, A_2, A_3]
