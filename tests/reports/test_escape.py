import pytest

from opus_jax.reports.chart import label
from opus_jax.reports.escape import escape


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<b>&\"'", "&lt;b&gt;&amp;&quot;&#x27;"),
        ("a\tb\nc", "a\tb\nc"),
        ("\x07", "\u2407"),
        ("\u202eabc\u200b", "[U+202E]abc[U+200B]"),
        ("𝒳 ünïcode", "𝒳 ünïcode"),
    ],
)
def test_text_and_chart_labels_are_made_harmless_alike(text: str, shown: str) -> None:
    assert escape(text) == label(text) == shown
