"""The operator: MoEModels of a Kubernetes cluster, reconciled into running models."""
