"""Errors of the control plane; every message can be shown to a user as it is.

FaasmoeError
├── MoEModelError       an invalid MoEModel (api/v1alpha1/)
├── PlanError           an invalid partitioning or fleet specification (plan/)
├── ScalingError        an invalid autoscaler setting or load (scaling/settings.py)
├── PlatformError       sandboxes that failed to start or were lost (platforms/, kube/platform.py)
│   └── PlatformStopping   no sandbox can be started, because all of the model is being deleted
├── KubeApiError        a failed request to the Kubernetes API (kube/errors.py)
├── SandboxClientError  a failed request to a sandbox (control/sandbox_client.py)
├── TlsFolderError      the operator's certificate is not usable (kube/operator.py)
└── CommandError        a command that failed (cli/)
"""


class FaasmoeError(Exception):
    """Base of all errors that the control plane reports without a traceback."""


class MoEModelError(FaasmoeError):
    """A MoEModel is invalid.

    Attributes:
        problems: one line for each problem: the field, its value and what was expected.
    """

    def __init__(self, name: str, problems: list[str]) -> None:
        super().__init__("\n".join(f"{name}: {problem}" for problem in problems))
        self.problems = tuple(problems)


class PlanError(FaasmoeError):
    """A plan's input is invalid; the message names the field, its value and what was expected."""


class PlatformError(FaasmoeError):
    """Sandboxes could not be started, or were lost."""


class PlatformStopping(PlatformError):
    """All of the model is being deleted, which is no failure."""


class CommandError(FaasmoeError):
    """A command failed.

    Attributes:
        exit_status: the exit status of the command.
    """

    def __init__(self, message: str, *, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status
