"""One look for everything that is drawn: colours, fonts, sizes, and how a figure is shown."""

import base64
import io

import matplotlib.pyplot as plt
from IPython.display import display
from PIL import Image

# colour-blind safe (Okabe and Ito); one colour per head for the whole walk
HEADS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
TINTS = ("#cfe3f1", "#fbe7bf", "#c6e9dc", "#f3dbe7", "#f6d3bd", "#dcf0fb")
BASE, MUTED, COPIED = "#4d4d4d", "#999999", "#dddddd"
OURS = HEADS[0]


def set_style() -> None:
    """Set matplotlib's defaults: small figures at twice the usual resolution, few lines, no boxes."""
    plt.rcParams.update(
        {
            "figure.figsize": (5.2, 3.0),
            "figure.dpi": 110,
            "savefig.dpi": 200,
            "savefig.bbox": "tight",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e8e8e8",
            "axes.axisbelow": True,
            "font.size": 9.5,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "legend.frameon": False,
        }
    )


def show(figure, alt: str) -> None:
    """Show a figure as a PNG, described by ``alt`` for those who cannot see it, at half its pixel size."""
    data = png(figure)
    width = Image.open(io.BytesIO(data)).width // 2
    plt.close(figure)
    picture = {"image/png": base64.b64encode(data).decode(), "text/plain": alt}
    display(picture, raw=True, metadata={"image/png": {"alt": alt, "width": width}})


def png(figure) -> bytes:
    """A figure as the bytes of a small PNG: 128 colours are enough and take about half the room."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(128).save(small, "png", optimize=True)
    return small.getvalue()


def ink(fill: str) -> str:
    """Black or white, whichever stands out more on a colour ``#rrggbb`` (contrast as WCAG 2 defines it)."""
    parts = [int(fill[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#ffffff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000000"


def tint(group: int | None) -> str:
    """The background of a token: by head, grey for copied ones, white for the base model's own."""
    if group is None:
        return "#ffffff"
    return COPIED if group < 0 else TINTS[group % len(TINTS)]


def drafted_by(group: int | None) -> str:
    """Who drafted a token, in words."""
    if group is None:
        return "base model"
    return "copied" if group < 0 else f"head {group}"


def in_order(groups) -> list[int | None]:
    """Each group once: the base model, the heads, copied tokens."""
    return sorted(set(groups), key=lambda g: (g is not None, g is not None and g < 0, g or 0))


def visible(text: str) -> str:
    """A token with its spaces, tabs and line ends made visible."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "∅"
