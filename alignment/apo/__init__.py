"""Adversarial preference optimisation (arXiv:2311.08045): data tools, policy updates, and the game's rounds."""
