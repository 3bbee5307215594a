"""The commands of ``python -m mae``, one a file: its options and what it does."""
