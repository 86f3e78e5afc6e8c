"""vLLM as the router's engine: its routed experts are functions, everything else is vLLM's own.

The only package that imports vLLM, and through its public plugin points only: `plugin` (entry point
`vllm.general_plugins`) registers a quantization config whose routed experts have no weights and
call functions (`quantization`, `expert_calls`), and a model loader that reads the router's tensors
from the store (`weights`). `process` runs vLLM's engine and its OpenAI app behind the tenants.
"""
