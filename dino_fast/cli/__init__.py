"""The commands of `dino-fast`: one file each, with its options and what it prints.

Nothing that imports torch is imported before a command runs, so `--help` answers at once.
"""
