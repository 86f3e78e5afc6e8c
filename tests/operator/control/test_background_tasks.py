"""Popularity persistence and read-ahead while idle, over a real tiny store."""

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from fake_platform import (
    TIMING,
    controller_and_platform,
    eventually,
    make_model,
    routable_functions,
)
from sandbox_processes import PreparedStore

from faasmoe_contracts.control_messages import FunctionLoad, LoadReport
from faasmoe_operator.control.background_tasks import BackgroundTasks
from faasmoe_operator.control.model import ControlledModel
from faasmoe_operator.control.sandbox_client import ModelStore
from faasmoe_operator.control.state_files import PopularityFile

FAST_TIMING = replace(
    TIMING, popularity_save_interval_s=0.02, read_ahead_interval_s=0.02, log_interval_s=0.01
)
USED = LoadReport("r", {"f0": FunctionLoad(0.0, 1, 100), "f1": FunctionLoad(0.0, 1, 10)})


@pytest.fixture
def model(prepared_store: PreparedStore) -> ControlledModel:
    store = prepared_store("mixtral")
    return make_model(2, store=ModelStore(store.path, store.manifest.digest))


def test_saves_popularity_and_reads_ahead(
    model: ControlledModel,
    prepared_store: PreparedStore,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = PopularityFile(tmp_path / "p.json", model_digest=model.store.model_digest)

    async def scenario() -> None:
        async with controller_and_platform(model, timing=FAST_TIMING) as (controller, _):
            tasks = BackgroundTasks(
                controller, store=prepared_store("mixtral"), popularity_file=file
            )
            running = asyncio.create_task(tasks.run())
            controller.add_load_report(USED)
            await eventually(lambda: bool(file.read()), "saved while running")
            await eventually(lambda: "read ahead the weights of 2 functions" in caplog.text)
            controller.activate(["f0"])
            await eventually(lambda: routable_functions(controller) == {"f0"})
            await eventually(lambda: "read ahead the weights of 1 functions" in caplog.text)
            controller.add_load_report(USED)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    with caplog.at_level(logging.DEBUG, logger="faasmoe_operator"):
        asyncio.run(scenario())
    rows = file.read()
    assert set(rows) == {"0:0,1", "1:0,1"}
    assert rows["0:0,1"] > 150  # the second report was saved at the end
