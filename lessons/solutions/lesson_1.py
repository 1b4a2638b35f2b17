"""Answers to the exercises of lesson 1: cells to paste."""
# 1a
answer_1a = np.mean(gold > 0)

# 1b
def gradient(d):
    """sigma(d) - 1: almost -1 where d is far below 0, almost 0 where it is far above."""
    return torch.sigmoid(d) - 1

answer_1b = gradient
