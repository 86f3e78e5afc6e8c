"""The router: the OpenAI API, the engine over the router-only model, and dispatch to experts."""
