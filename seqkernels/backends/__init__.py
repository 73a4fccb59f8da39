"""The backends, one module or folder each, which says everything about its backend.

`select` asks a backend by the functions of `Backend`; ``seqkernels.ops`` registers the `forward` and `backward` of
those that are an operator pair. What they share: `cells`, `call`, `arguments`, `stack`, `autocast`, `precision`, and
`costs` with `measured`.
"""

from typing import Protocol

from seqkernels.backends.call import Call
from seqkernels.hardware import Machine


class Backend(Protocol):
    """The questions that every backend answers."""

    DESCRIPTION: str

    def unsupported(self, call: Call, machine: Machine) -> str | None:
        """Why it cannot run the call; None if it can."""

    def reason_not_default(self, call: Call, machine: Machine) -> str | None:
        """Why it runs the call only if it is named, though it can; None if it may be chosen."""

    def estimate(self, call: Call, machine: Machine) -> float | None:
        """Microseconds of a step through all layers, forward and, in training, backward; None: nothing is known."""

    def plan_launch(self, call: Call, machine: Machine) -> tuple[int, ...]:
        """What its operators are told of the launch; () where there is nothing to tell, or no size is known."""

    def kernel(self, call: Call, machine: Machine) -> str:
        """Which of its kernels run, in words; "" where there is no choice, or no size is known."""
