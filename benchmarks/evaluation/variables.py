"""Variables of a full model's server beyond the router's own; full_model.py says what for."""

CHECKPOINT = "FAASMOE_BENCH_CHECKPOINT"
EXPERTS = "FAASMOE_BENCH_EXPERTS"
