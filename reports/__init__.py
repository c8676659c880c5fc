"""Records of runs, and what is made of them.

`records.py` is the schema: it writes and reads the file of a run. `terminal.py` and `markdown.py` show a run
that was read back. Nothing here imports another package of this project, and what is shown depends on the
record file alone, so that a report can be rebuilt at any time.
"""
