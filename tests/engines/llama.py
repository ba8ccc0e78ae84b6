"""llama.cpp's server, as the package xllamacpp has it ready-made: run by the Python of `.engines`."""

import signal
import sys

import xllamacpp

from tests.engines import CONTEXT_TOKENS, MODEL

SLOTS = 2


def serve(port: int, seed: int) -> None:
    """Serve `MODEL.gguf` of the current folder until killed, with what llama-server has by default."""
    params = xllamacpp.CommonParams()
    params.model.path = f"{MODEL}.gguf"
    params.model_alias = {MODEL}
    params.hostnames, params.port = ["127.0.0.1"], port
    params.n_ctx, params.n_parallel, params.kv_unified = SLOTS * CONTEXT_TOKENS, SLOTS, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.sampling.seed = seed
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
