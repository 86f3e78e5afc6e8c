import pytest, torch
from families.registry import FAMILIES, forward_logits
from families.inputs import prompts
from sandboxes import *
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.engine.model import load_router_model


def test_smoke(prepared_store, sandbox):
    f = [f for f in FAMILIES if f.name == "muse_spark"][0]
    store = prepared_store(f.name)
    with sandbox(capacity=100, token="x") as box:
        table = box.attach_blocks(store, 3)
        d = Dispatcher(store, table, token="x")
        m = load_router_model(store, d, device=torch.device("cpu"))
        a = forward_logits(f, f.build(), prompts())
        b = forward_logits(f, m, prompts())
        print((a - b).abs().max())
        d.close()
