"""Environment variables of full_model.py; separate, because strategies.py must not import torch."""

CHECKPOINT = "FAASMOE_BENCH_CHECKPOINT"
EXPERTS = "FAASMOE_BENCH_EXPERTS"
