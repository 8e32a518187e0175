"""A roofline estimate of a program's time, from what a chip can do at best."""

import dataclasses

from vlalign_jax.sharding.chips import Chip

# The share of the maker's numbers that large products and transfers reach.
UTILIZATION = {"compute": 0.6, "memory": 0.8, "interconnect": 0.5}
# The share of the shorter two that the longest of the three does not hide.
EXPOSED = 0.25
ASSUMPTION = (
  "time: the compiled program's operations, bytes accessed and bytes sent at {compute:.0%} of the "
  "chip's FLOP/s, {memory:.0%} of its memory's and {interconnect:.0%} of its links' bandwidth; the "
  "longest of the three, and {exposed:.0%} of the other two, which do not overlap"
).format(**UTILIZATION, exposed=EXPOSED)


@dataclasses.dataclass(frozen=True)
class Time:
  """Seconds of a program if it did nothing but compute, access memory, or send."""

  compute: float
  memory: float
  interconnect: float

  @property
  def total(self) -> float:
    """Returns the seconds of the program."""
    times = self.compute, self.memory, self.interconnect
    return max(times) + EXPOSED * (sum(times) - max(times))

  @property
  def bound(self) -> str:
    """Returns which of the three takes the longest."""
    times = dataclasses.asdict(self)
    return max(times, key=lambda name: times[name])


def estimate(chip: Chip, flops: float, accessed: float, sent: float) -> Time | None:
  """Returns the time of a program on one device; None if the chip's speed is not known.

  Args:
    chip: the device.
    flops: operations that it runs.
    accessed: bytes between its memory and its cores.
    sent: bytes that it sends to other devices.
  """
  if chip.flops is None or chip.bandwidth is None or chip.interconnect is None:
    return None
  return Time(
    compute=flops / (chip.flops * UTILIZATION["compute"]),
    memory=accessed / (chip.bandwidth * UTILIZATION["memory"]),
    interconnect=sent / (chip.interconnect * UTILIZATION["interconnect"]),
  )
