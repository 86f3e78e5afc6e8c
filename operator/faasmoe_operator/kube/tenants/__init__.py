"""Tenants on Kubernetes: the gateways' configuration, limits and usage; each Tenant's status."""
