"""Adversarial preference optimization (arXiv:2311.08045): data tools, policy updates, and the rounds of the game."""
