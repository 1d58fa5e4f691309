"""The exception tree.

PdrelayError
├── ConfigError              bad flags, files, models, topologies: one line, cause and fix
│   └── ModelError           a model directory that cannot be served
├── LaunchError              a worker did not start
├── RequestError             one request is refused or lost; carries its HTTP status
│   ├── InvalidRequestError  400
│   ├── OverloadedError      429, with retry_after seconds
│   ├── WorkerLostError      503, the worker that held the request died
│   └── DeadlineError        504, a wait reached its deadline
├── TransportError           KV pages could not be moved
└── ProtocolError            a peer sent what the protocol does not allow
"""


class PdrelayError(Exception):
    """Base of every error that pdrelay raises on purpose."""


class ConfigError(PdrelayError):
    """Bad flags, config file, or topology. The message is one line: the cause, then the fix."""


class ModelError(ConfigError):
    """A model directory that cannot be served."""


class LaunchError(PdrelayError):
    """A worker process did not become ready."""


class RequestError(PdrelayError):
    """One request is refused or lost. `status` is its HTTP status, `code` a short stable word."""

    status = 500
    code = "internal_error"


class InvalidRequestError(RequestError):
    status = 400
    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class OverloadedError(RequestError):
    status = 429
    code = "overloaded"

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class WorkerLostError(RequestError):
    status = 503
    code = "worker_lost"


class DeadlineError(RequestError):
    status = 504
    code = "deadline_exceeded"


class TransportError(PdrelayError):
    """KV pages could not be moved, or arrived damaged."""


class ProtocolError(PdrelayError):
    """A peer sent what the protocol does not allow."""
