"""What tests of figures ask of every figure."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg


def shown(place):
    """The numbers of the first image on some axes."""
    return np.asarray(place.images[0].get_array())


def check_layout(figure):
    """Every text lies within the figure, and no two texts overlap; letters have at least seven points."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [text for text in _texts(figure) if text.get_visible() and text.get_text().strip()]
    boxes = [text.get_window_extent(renderer) for text in texts]
    for text, box in zip(texts, boxes, strict=True):
        said = f"{text.get_text()!r} at {box}"
        assert text.get_size() >= 7, said
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, said
    for number, (text, box) in enumerate(zip(texts, boxes, strict=True)):
        for other, place in zip(texts[:number], boxes[:number], strict=True):
            width = min(box.x1, place.x1) - max(box.x0, place.x0)
            height = min(box.y1, place.y1) - max(box.y0, place.y0)
            apart = width <= 1 or height <= 1
            assert apart, f"{text.get_text()!r} overlaps {other.get_text()!r}"


def _texts(figure):
    """Every text that is drawn: titles, labels, ticks within their axis' limits, legends, notes."""
    yield from figure.texts
    for legend in figure.legends:
        yield from legend.get_texts()
    for part in (figure, *figure.subfigs):
        for name in ("_suptitle", "_supxlabel", "_supylabel"):
            if getattr(part, name, None) is not None and getattr(part, name) not in figure.texts:
                yield getattr(part, name)
    for place in figure.axes:
        if not place.axison:
            continue
        yield from (place.title, place.xaxis.label, place.yaxis.label, *place.texts)
        if place.get_legend() is not None:
            yield from place.get_legend().get_texts()
        for axis in (place.xaxis, place.yaxis):
            if not axis.get_visible():
                continue
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                if low <= tick.get_loc() <= high and tick.label1.get_visible():
                    yield tick.label1
