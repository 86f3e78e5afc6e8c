"""Serves a tiny chat model with `faasmoe up`, for clients that run in other environments.

    python tests/clients/serve.py FOLDER PORT API_KEY

The model is random, so its texts mean nothing; that a client accepts the answers is what counts.
FAASMOE_CLIENTS_ENGINE names the router's engine: transformers, or vllm, for which
FAASMOE_VLLM_PYTHON names the interpreter that has it.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))

from engines import OURS, VLLM
from tiny_chat import SPECIAL_TOKENS
from vllm_checkpoints import give_end_token

CONTEXT_TOKENS = 8192
MOEMODEL = """
apiVersion: faasmoe.dev/v1alpha1
kind: MoEModel
metadata: {{name: tiny}}
spec:
  model: {{source: "file://{model}"}}
  store: {{path: "{store}"}}
  granularity: {{expertsPerFunction: 2, layersPerFunction: 1}}
  router: {router}
  experts: {{device: cpu, functionsPerSandbox: 8}}
"""


def main() -> None:
    """Save the model, if necessary, and become `faasmoe up`."""
    folder, port, api_key = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    model = folder / "model"
    name = os.environ.get("FAASMOE_CLIENTS_ENGINE", OURS.name)
    engine = {engine.name: engine for engine in (OURS, VLLM)}[name]
    if not model.exists():
        engine.save_model(model, max_model_len=CONTEXT_TOKENS)
        if engine is VLLM:
            give_end_token(model, SPECIAL_TOKENS[0])
    router = json.dumps(engine.router_spec(maxNumSeqs=8, kvCacheMemory="256Mi"))
    file = folder / "tiny.yaml"
    file.write_text(MOEMODEL.format(model=model, store=folder / "store", router=router))
    up = ["-m", "faasmoe_operator.cli", "up", "-f", str(file), "--port", port]
    os.execv(sys.executable, [sys.executable, *up, "--api-key", api_key])


if __name__ == "__main__":
    main()
