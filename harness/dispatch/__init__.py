"""Runs the project's own commands elsewhere, several at once, and makes one record of them.

A *shard* is one command, such as `v32 verify --checks parity`, that runs in a process of its own. `shards.py` says which
shards a request amounts to, `local.py` runs one on this machine (or inside a container, which is a machine too),
`modal.py` owns the Modal App and sends shards there, `fan_out.py` runs many and keeps what comes, `merging.py` makes
one record of what was kept, and `command.py` is what the command line and `suites/gpu.py` call.
"""
