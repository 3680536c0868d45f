"""The page around charts and texts: sections, and a document that needs no network and runs no script but its own two.

The content security policy names the hashes of those scripts, so that nothing else could run even if some text
slipped through.
"""

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder

from opus_jax.reports.chart import Chart
from opus_jax.reports.escape import escape


def section(heading: str, note: str, charts: list[Chart], content: str = "") -> str:
    if not (charts or note or content):
        return ""
    drawn = f'<div class="charts">{"".join(map(_figure, charts))}</div>' if charts else ""
    return f'<section><h2>{escape(heading)}</h2><p class="soft">{escape(note)}</p>{content}{drawn}</section>'


def _figure(chart: Chart) -> str:
    buttons = "".join(_button(chart.id, name, pressed=i == 0) for i, name in enumerate(chart.axes or {}))
    axes = f'<div class="axes" role="group" aria-label="Horizontal axis">{buttons}</div>' if buttons else ""
    # The caption of a chart was made for plotly, so it is escaped already.
    return (
        f'<figure class="{"wide" if chart.wide else ""}"><h3>{escape(chart.title)}</h3>'
        f"<figcaption>{chart.caption}</figcaption>{axes}"
        f'<div class="plot" id="plot-{chart.id}" role="img" aria-label="{escape(chart.title)}"></div></figure>'
    )


def _button(chart: str, name: str, pressed: bool) -> str:
    return f'<button type="button" data-chart="{chart}" aria-pressed="{str(pressed).lower()}">{escape(name)}</button>'


def document(title: str, body: str, charts: list[Chart]) -> str:
    style, script = (files("opus_jax.reports").joinpath(name).read_text() for name in ("page.css", "page.js"))
    plotly = get_plotlyjs()
    policy = (
        f"default-src 'none'; script-src {_hash(plotly)} {_hash(script)}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<noscript><p>The charts of this page need JavaScript; tables and texts do not.</p></noscript>
{body}
<script type="application/json" id="charts">{_json([_data(chart) for chart in charts])}</script>
<script>{plotly}</script>
<script>{script}</script>
</body>
</html>
"""


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _data(chart: Chart) -> dict[str, Any]:
    figure = chart.figure.to_plotly_json()
    figure["layout"].pop("template", None)
    return {"id": chart.id, "figure": figure, "axes": chart.axes}


def _json(value: Any) -> str:
    """JSON that can stand inside a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(value, cls=PlotlyJSONEncoder)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
