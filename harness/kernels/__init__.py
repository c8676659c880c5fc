"""The compile proof: every Triton kernel, for every GPU that it is written for, without one of them.

Read it in this order: budgets (what a compiled kernel may take) → sass (what its code says) → compiling (one kernel
for one target) → worker (the processes that do it) → command.
"""
