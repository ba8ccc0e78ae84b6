"""`make bench`: what this server costs, measured in one run against the upstream itself and against the floor.

The floor is a pass-through on bare asyncio sockets that decodes each chunk and encodes each delta, and stores nothing: less
than it nobody who writes Python can pay. Times say much about the machine and whoever else uses it; ratios say more. So the
targets of a scenario take turns within each round, and every figure is the median of the rounds.

    http        just enough HTTP/1.1 on asyncio protocols, both ends, so that the generator and the upstream are no bottleneck
    upstream    a Chat Completions server that says as much, and as fast, as the model's name asks: `bench-200x5`
    floor       the pass-through
    libraries   another one, made of the server's own HTTP libraries: what the server costs beyond it is its own
    stage       starts everything, reads CPU and memory out of /proc
    load        clients: requests one behind the other, streams side by side, what they saw
    scenarios   one function for each thing that is measured
    figures     what is to be reached, and tables
    plots       SVG for docs/performance.md
"""
