"""What lies between two ranks: its rate by its name, and how much of it sums of tensors get."""

from __future__ import annotations

from dataclasses import dataclass

from lisa_kernels.plan.machines import Seconds

# Shares of a link's rate.
FAST, SLOW = 0.95, 0.75


@dataclass(frozen=True)
class Link:
    """A link: 1e9 bytes a second in each direction, and the microseconds from one message to its answer."""

    name: str
    bandwidth_gb_s: float
    answer_us: tuple[float, float]

    def seconds(self, sent: float, messages: float) -> Seconds:
        """Return what so many bytes and so many messages that wait for one another take."""
        return Seconds(
            *(
                sent / (self.bandwidth_gb_s * 1e9 * share) + messages * answer * 1e-6
                for share, answer in zip((FAST, SLOW), self.answer_us)
            )
        )


# By their standards; PCIe 4 of 16 lanes between cards that reach each other, NVLink as of an A100.
LINKS = (
    Link("1 GbE", 0.125, (100, 400)), Link("10 GbE", 1.25, (50, 200)), Link("100 GbE", 12.5, (20, 100)),
    Link("PCIe 4", 31.5, (20, 60)), Link("NVLink", 300.0, (20, 60)),
)  # fmt: skip
