"""Property tests run the same examples everywhere, however slow the machine is."""

from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
