"""Studies that make evidence for the docs, each run by `python -m laptop.studies.NAME`."""
