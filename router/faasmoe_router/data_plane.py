"""What a router calls functions and counts tenants with, built from its settings.

Both engines use it, each where its layers are computed: the store, the dispatcher with its link to
the control process, and the tenants.
"""

from __future__ import annotations

import json
import re
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from faasmoe_contracts.routing_table import RoutingTable, RoutingTableError
from faasmoe_contracts.store import Store, StoreError
from faasmoe_contracts.tls import OPERATOR_NAME, TlsPeer, models_name
from faasmoe_router.config import RouterConfig, open_tls_folder
from faasmoe_router.control import ControlLink, LinkSettings
from faasmoe_router.control.activator import ActivationQueueLimits, ActivationRequester
from faasmoe_router.control.client import ControlClient
from faasmoe_router.control.link import FunctionDispatcher
from faasmoe_router.control.metrics import ControlLinkMetrics
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.dispatch.cold_start import ActivationSettings
from faasmoe_router.dispatch.device_transfer import BufferedTransfer
from faasmoe_router.dispatch.fanout import DispatchTimeouts
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.overflow import is_memory_limited
from faasmoe_router.errors import RouterConfigError
from faasmoe_router.tenants.quota import ActivationQueueCapacity
from faasmoe_router.tenants.registry import TenantRegistry
from faasmoe_router.tenants.service import TenantQueue, TenantService, UsageSources
from faasmoe_router.tenants.usage import FunctionCost, RouterUsage
from faasmoe_router.tenants.usage_store import UsageFileStore


def open_store(path: Path) -> Store:
    """Open the store; raises RouterConfigError naming the variable."""
    try:
        return Store.open(path)
    except (StoreError, OSError) as error:
        raise RouterConfigError(f"FAASMOE_STORE: {error}") from error


def read_model_config(store: Store) -> dict[str, Any]:
    """Return a store's config.json; raises RouterConfigError naming the variable."""
    path = store.path / "model" / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RouterConfigError(f"FAASMOE_STORE: {path}: {error}") from error
    if not isinstance(config, dict):
        raise RouterConfigError(
            f"FAASMOE_STORE: {path}: got {type(config).__name__}, expected a JSON object"
        )
    return config


def create_dispatcher(
    store: Store,
    config: RouterConfig,
    registry: CollectorRegistry,
    host_buffers: BufferedTransfer | None,
) -> tuple[Dispatcher, ControlLink | None]:
    """Return the dispatcher, and its link unless the routing table is a file.

    Args:
        store: the prepared model.
        config: the router's settings.
        registry: receives the metrics of both.
        host_buffers: moves data between the model's device and the host; None on the host.

    Raises:
        RouterConfigError: the routing table cannot be used.
    """
    if config.control_url is None:
        metrics = DispatchMetrics(registry)
        return _create_static_dispatcher(store, config, metrics, host_buffers), None
    return _create_link(store, config, config.control_url, registry, host_buffers)


def create_front_link(
    view: FunctionDispatcher,
    config: RouterConfig,
    url: str,
    registry: CollectorRegistry,
    *,
    store: Store,
) -> ControlLink:
    """Return the link of a process that queues requests and calls no functions.

    Args:
        view: holds the routing table.
        config: the router's settings.
        url: base URL of the control plane.
        registry: receives the link's metrics.
        store: the prepared model.
    """
    return _control_access(store, config, url, registry).link(view)


@dataclass(frozen=True, slots=True)
class _ControlAccess:
    """What a link to the control plane consists of, apart from the dispatcher.

    Attributes:
        client: calls the control API.
        requester: asks for activations.
        settings: the link's settings.
        metrics: the link's metrics.
    """

    client: ControlClient
    requester: ActivationRequester
    settings: LinkSettings
    metrics: ControlLinkMetrics

    def link(self, dispatcher: FunctionDispatcher) -> ControlLink:
        """Return the link of a dispatcher."""
        return ControlLink(
            self.client, self.requester, dispatcher, settings=self.settings, metrics=self.metrics
        )


def _control_access(
    store: Store, config: RouterConfig, url: str, registry: CollectorRegistry
) -> _ControlAccess:
    metrics = ControlLinkMetrics(registry)
    client = ControlClient(url, token=config.token, tls=_tls_peer(config, OPERATOR_NAME))
    computes_overflow = is_memory_limited(store, config.experts_memory_bytes)
    settings = _link_settings(config, queues_requests=not computes_overflow)
    requester = ActivationRequester(
        client,
        router_name=settings.router_name,
        metrics=metrics,
        repeat_s=settings.activation_repeat_s,
    )
    return _ControlAccess(client, requester, settings, metrics)


def _link_settings(config: RouterConfig, *, queues_requests: bool) -> LinkSettings:
    """Return the settings of a link, with a name of its own.

    Args:
        config: the router's settings.
        queues_requests: whether requests wait for missing functions.
    """
    return LinkSettings(
        router_name=_new_router_name(),
        queues_requests=queues_requests,
        queue_limits=ActivationQueueLimits(
            max_requests=config.max_activation_queue_requests,
            max_bytes=config.max_activation_queue_bytes,
            timeout_s=config.activation_timeout_s,
        ),
    )


def _create_static_dispatcher(
    store: Store,
    config: RouterConfig,
    metrics: DispatchMetrics,
    host_buffers: BufferedTransfer | None,
) -> Dispatcher:
    assert config.table is not None
    try:
        table = RoutingTable.loads(config.table.read_bytes())
        return Dispatcher(
            store,
            table,
            token=config.token,
            metrics=metrics,
            timeouts=_call_timeouts(config),
            socket_dir=config.socket_dir,
            device_transfer=host_buffers,
            placement=config.placement,
            mailbox=config.mailbox == "on",
            tls=_tls_peer(config, models_name(config.tls_namespace)),
        )
    except (RoutingTableError, OSError) as error:
        raise RouterConfigError(f"FAASMOE_TABLE: {error}") from error


def _call_timeouts(config: RouterConfig) -> DispatchTimeouts:
    return DispatchTimeouts(config.connect_timeout_s, config.call_timeout_s, config.layer_timeout_s)


def _create_link(
    store: Store,
    config: RouterConfig,
    url: str,
    registry: CollectorRegistry,
    host_buffers: BufferedTransfer | None,
) -> tuple[Dispatcher, ControlLink]:
    access = _control_access(store, config, url, registry)
    dispatcher = Dispatcher(
        store,
        None,
        token=config.token,
        metrics=DispatchMetrics(registry),
        activation=ActivationSettings(
            access.requester.request_threadsafe, timeout_s=config.call_queue_timeout_s
        ),
        timeouts=_call_timeouts(config),
        socket_dir=config.socket_dir,
        device_transfer=host_buffers,
        placement=config.placement,
        mailbox=config.mailbox == "on",
        computes_overflow=not access.settings.queues_requests,
        tls=_tls_peer(config, models_name(config.tls_namespace)),
    )
    return dispatcher, access.link(dispatcher)


def _tls_peer(config: RouterConfig, name: str) -> TlsPeer | None:
    """Return how to know a server of this name; None without TLS; raises RouterConfigError."""
    folder = open_tls_folder(config)
    return None if folder is None else TlsPeer(folder, name)


def create_tenant_service(
    tenant_registry: TenantRegistry,
    config: RouterConfig,
    *,
    queue: TenantQueue,
    read_cost: Callable[[], FunctionCost],
    read_tokens: Callable[[], Mapping[str, int]],
) -> TenantService:
    """Return the tenants of the router, with the usage that was saved.

    Args:
        tenant_registry: the tenants.
        config: the router's settings.
        queue: fair queue of their sequences.
        read_cost: returns what functions cost since its last call.
        read_tokens: returns the tokens computed for each tenant since its last call.
    """
    usage_store = None if config.state_dir is None else UsageFileStore(config.state_dir)
    return TenantService(
        tenant_registry,
        RouterUsage(time.time()) if usage_store is None else usage_store.load(),
        queue=queue,
        usage_sources=UsageSources(read_cost, read_tokens),
        store=usage_store,
        queue_capacity=ActivationQueueCapacity(
            config.max_activation_queue_requests, config.max_activation_queue_bytes
        ),
        n_routers=config.router_replicas,
    )


def read_tenants(config: RouterConfig) -> TenantRegistry | None:
    """Return the tenants of the tenants file; None without one."""
    return None if config.tenants_file is None else TenantRegistry(config.tenants_file)


def _new_router_name() -> str:
    """Return a unique name: 1 to 64 letters, digits, dots and dashes."""
    host = re.sub("[^A-Za-z0-9.-]", "-", socket.gethostname())
    return f"{host[:40]}-{secrets.token_hex(4)}"
