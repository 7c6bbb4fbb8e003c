"""The data sets that come with the toolkit; importing this package registers them."""

from data.builtin import alpaca, apo, apo_samples, excerpt, hh, local, safe_rlhf, tldr

__all__ = ["alpaca", "apo", "apo_samples", "excerpt", "hh", "local", "safe_rlhf", "tldr"]
