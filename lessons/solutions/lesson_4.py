"""Answers to the exercises of lesson 4: cells to paste."""
# 4a
answer_4a = np.log(32)  # a blind guess among 32

# 4b
def differences(h):
    return torch.cat([h[:, 0] - h[:, 1], h[:, 1] - h[:, 0]])

answer_4b = differences
