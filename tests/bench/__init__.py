"""`make bench`: what this server costs, measured in one run against the upstream itself and against the floor.

The floor is a pass-through on bare asyncio sockets that decodes each chunk and encodes each delta, and stores nothing: the
lowest cost in Python. Times depend on the machine and its load; ratios depend on them less. So the targets of a scenario take
turns within each round, and every figure is the median of the rounds.

    http        just enough HTTP/1.1 on asyncio protocols, both ends, so that the generator and the upstream are no bottleneck
    upstream    a Chat Completions server whose model's name sets the amount and pace of its output: `bench-200x5`
    floor       the pass-through
    libraries   another one, made of the server's own HTTP libraries: the server's cost beyond it is its own
    stage       starts everything, reads CPU and memory out of /proc
    load        clients: sequential requests, concurrent streams, and what they measure
    scenarios   one function for each thing that is measured
    figures     targets and tables
    plots       SVG for docs/performance.md
"""
