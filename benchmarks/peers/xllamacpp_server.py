"""Runs llama.cpp's server in the peers' environment, until its standard input is closed.

`PYTHON xllamacpp_server.py SETTINGS` with the Python that has xllamacpp; SETTINGS is a JSON object
of `llama_server.server_settings`. Prints one JSON line: the address, and the instruction sets that
this build of llama.cpp uses. It must not import anything of this repository.
"""

import json
import os
import sys

import xllamacpp  # type: ignore[import-not-found]


def make_params(settings: dict[str, int | str]) -> "xllamacpp.CommonParams":
    """Return llama.cpp's parameters; prompts are never cached, so that none is for free."""
    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.port = settings["port"]
    params.n_parallel = settings["parallel"]
    params.n_ctx = settings["context"]
    params.cont_batching = True
    params.cache_prompt = False
    params.cache_ram_mib = 0
    params.cpuparams.n_threads = settings["threads"]
    params.cpuparams_batch.n_threads = settings["threads"]
    params.ui = False
    return params


def main() -> None:
    """Serve one model."""
    server = xllamacpp.Server(make_params(json.loads(sys.argv[1])))
    ready = {
        "url": server.listening_address,
        "system_info": xllamacpp.get_system_info(),
        "version": xllamacpp.__version__,
    }
    print(json.dumps(ready), flush=True)
    sys.stdin.read()
    os._exit(0)  # the server's own shutdown may take seconds


if __name__ == "__main__":
    main()
