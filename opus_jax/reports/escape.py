"""Text from outside made harmless: what names, labels and texts of a corpus go through before they reach the page."""

import html
import unicodedata


def escape(text: str) -> str:
    """Text for the page: no markup, and controls that do not break lines as visible symbols."""
    return html.escape("".join(map(_visible, text)))


def _visible(character: str) -> str:
    if character in "\n\t":
        return character
    code = ord(character)
    if code < 32:
        return chr(0x2400 + code)
    # Invisible characters that reorder or hide text would make it read as something it is not.
    return f"[U+{code:04X}]" if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") else character
