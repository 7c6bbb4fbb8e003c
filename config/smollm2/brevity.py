"""A reward function as a user writes it (docs/rewards.md): answers that come to an end, in few words."""


def brevity(responses, finished):
    """1 for an answer that ended by itself, less 0.02 for each word."""
    return [float(done) - 0.02 * len(text.split()) for text, done in zip(responses, finished, strict=True)]
