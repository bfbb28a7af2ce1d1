"""Loss scaling: half-precision gradients are computed of a scaled loss, so that the small ones do not vanish."""

from __future__ import annotations

from dataclasses import dataclass

from pixart_nb.core.errors import PixArtNBError


@dataclass
class LossScale:
    """The scale of the loss (Micikevicius et al. 2018, section 3.2).

    ``dynamic``: divided by ``factor`` when a gradient overflows, multiplied by it after ``window`` updates without.
    Otherwise it stays. 1 and not dynamic is no scaling at all.
    """

    value: float = 1.0
    dynamic: bool = False
    factor: float = 2.0
    window: int = 1000
    good: int = 0  # updates since the scale last changed

    def __post_init__(self):
        if self.value < 1 or self.factor <= 1 or self.window < 1:
            raise PixArtNBError(
                f"loss scale {self.value}, factor {self.factor}, window {self.window}; expected a scale of at least 1, "
                "a factor above 1 and a window of at least 1"
            )

    @property
    def used(self) -> bool:
        """Whether the loss has to be multiplied."""
        return self.dynamic or self.value != 1.0

    def succeeded(self) -> None:
        """An update was done: grow after ``window`` of them."""
        self.good += 1
        if self.dynamic and self.good >= self.window:
            self.value, self.good = self.value * self.factor, 0

    def overflowed(self) -> bool:
        """A gradient was not finite: shrink. False if the scale is not to blame, since it cannot shrink."""
        if not self.dynamic or self.value == 1.0:
            return False
        self.value, self.good = max(1.0, self.value / self.factor), 0
        return True
