"""Answers to the exercises of lesson 6: cells to paste."""
# 6a
def least_J(k):
    """k (k - 1) / 2 pairs, each sigma(0) = 1/2, times 2 / k^2."""
    return (k - 1) / (2 * k)

answer_6a = least_J

# 6b
def step(theta, dL, dJ, alpha, eta):
    theta_prime = theta + eta * dJ(theta)
    return theta - alpha * dL(theta_prime)  # theta moves, by the gradient at theta'

answer_6b = step
