"""`v32 bench`: time and memory of a subject against its peers, paired in one run, each point in a process of its own.

Read it in this order: point → subjects → passes, operators (what is run) → worker (the process that runs it) → process,
paired (who asks it, and when) → fits → targets → command. Beside them: flops.
"""
