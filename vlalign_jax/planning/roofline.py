"""The time of a program from what a chip can do at best, and how much of that to expect."""

import dataclasses

from vlalign_jax.planning.chips import Chip

# Of the maker's numbers, what large products and transfers reach.
UTILIZATION = {"compute": 0.6, "memory": 0.8, "interconnect": 0.5}
# Of the shorter two of the three, the share that is not hidden behind the longest.
EXPOSED = 0.25
ASSUMPTION = (
  "time: the compiled program's operations, bytes accessed and bytes sent at {compute:.0%} of the "
  "chip's FLOP/s, {memory:.0%} of its memory's and {interconnect:.0%} of its links' bandwidth; the "
  "longest of the three, and {exposed:.0%} of the other two, which do not overlap"
).format(**UTILIZATION, exposed=EXPOSED)


@dataclasses.dataclass(frozen=True)
class Time:
  """Seconds of a program by what would bound it."""

  compute: float
  memory: float
  interconnect: float

  @property
  def total(self) -> float:
    """Seconds of the program."""
    longest = max(self.compute, self.memory, self.interconnect)
    rest = self.compute + self.memory + self.interconnect - longest
    return longest + EXPOSED * rest

  @property
  def bound(self) -> str:
    """What takes the longest."""
    times = dataclasses.asdict(self)
    return max(times, key=times.get)


def estimate(chip: Chip, flops: float, accessed: float, sent: float) -> Time | None:
  """Returns the seconds of a program on one device; None where the chip's speed is not known.

  Args:
    chip: the device.
    flops: operations on one device.
    accessed: bytes between HBM and cores.
    sent: bytes to other devices.
  """
  if chip.flops is None:
    return None
  return Time(
    compute=flops / (chip.flops * UTILIZATION["compute"]),
    memory=accessed / (chip.bandwidth * UTILIZATION["memory"]),
    interconnect=sent / (chip.interconnect * UTILIZATION["interconnect"]),
  )
