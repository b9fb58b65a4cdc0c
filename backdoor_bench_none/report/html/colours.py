"""The colours of the heat map: viridis, which is even in lightness and safe for colour-blind readers, and its text."""

from __future__ import annotations

VIRIDIS = (
    "#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c", "#22a884", "#44bf70", "#7ad151", "#bddf26",
    "#fde725",
)  # fmt: skip
#: classes v0 (worst) to v40 (best)
STEPS = 40
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
Rgb = tuple[int, int, int]


def step_of(share: float, lower_is_better: bool) -> int:
    """The step of a share between 0 and 1; the bright end is always the better one."""
    goodness = min(1.0, max(0.0, share))
    if lower_is_better:
        goodness = 1 - goodness
    return int(goodness * STEPS + 0.5)


def colour_of(step: int) -> Rgb:
    """The colour of a step, interpolated between the two nearest colours of `VIRIDIS`; 0 to 255 each."""
    last = len(VIRIDIS) - 1
    index, rest = divmod(step * last, STEPS)
    low, high = _parse(VIRIDIS[index]), _parse(VIRIDIS[min(index + 1, last)])
    red, green, blue = (round(a + (b - a) * rest / STEPS) for a, b in zip(low, high, strict=True))
    return red, green, blue


def text_on(colour: Rgb) -> Rgb:
    """Black or white, whichever has the higher contrast: at least 4.5 to 1 on any colour."""
    return max(BLACK, WHITE, key=lambda text: contrast(text, colour))


def contrast(one: Rgb, other: Rgb) -> float:
    """The contrast ratio of two colours by WCAG, 1 to 21."""
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def heat_css() -> str:
    """The style sheet with a class for each step."""
    lines = []
    for step in range(STEPS + 1):
        colour = colour_of(step)
        lines.append(f".v{step}{{background:{_css(colour)};color:{_css(text_on(colour))}}}")
    return "\n".join(lines)


def _parse(text: str) -> Rgb:
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


def _css(colour: Rgb) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour)


def _luminance(colour: Rgb) -> float:
    red, green, blue = map(_linear, colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _linear(part: int) -> float:
    """A part of an sRGB colour, 0 to 255, as linear light."""
    share = part / 255
    if share <= 0.04045:
        return share / 12.92
    return float(((share + 0.055) / 1.055) ** 2.4)
