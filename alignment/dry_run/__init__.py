"""``--dry_run true``: what a run will need and whether it works, told by one step of a small model of its shape."""
