"""Readers of the formats in which Debian packages carry text. Each turns an unpacked package into documents."""
