"""Errors of the control plane; every message can be shown to a user as it is.

FaasmoeError
├── MoEModelError   a MoEModel that cannot be used (spec/)
├── PlanError       a model that cannot be cut as asked (plan/functions.py)
├── PlatformError   sandboxes that cannot be started or were lost (platforms/)
├── ApiError        the Kubernetes API said no, or nothing (kube/errors.py)
├── SandboxError    a sandbox that refused or did not answer (control/sandbox_client.py)
└── CommandError    a command that cannot do its work (cli/)
"""


class FaasmoeError(Exception):
    """Anything that the control plane reports to its user without a traceback."""


class MoEModelError(FaasmoeError):
    """A MoEModel that cannot be used.

    Attributes:
        problems: one line for each fault: field, what was got, what was expected.
    """

    def __init__(self, name: str, problems: list[str]) -> None:
        super().__init__("\n".join(f"{name}: {problem}" for problem in problems))
        self.problems = tuple(problems)


class PlanError(FaasmoeError):
    """A model that cannot be cut into functions as asked; names the field, got, expected."""


class PlatformError(FaasmoeError):
    """Sandboxes that could not be started, or that were lost."""


class CommandError(FaasmoeError):
    """A command that cannot do its work.

    Attributes:
        status: the exit status of the command.
    """

    def __init__(self, message: str, *, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status
