"""A checkpoint that is too large to be built as a model, checked one layer at a time on real hidden states.

    hub or folder --source--> files --tokens--> text --walk--> for each layer: read, run three models on it, judge, free

Of every layer the reference in fp64, the reference in the run's dtype and the subject get the same input, keys, experts
and attention output, so that an error shows in the layer and stage where it arises. What the fp64 reference makes of its
input is the next layer's. `source.py` finds or downloads the files, `tokens.py` makes text of them, `needs.py` says what
a walk takes, `layer.py` reads and runs one layer, `judge.py` turns three runs into verdicts, `progress.py` keeps what
has been done, `command.py` is what the command line calls, and `__main__.py` what a shard on Modal runs.
"""
