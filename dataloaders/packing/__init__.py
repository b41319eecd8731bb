"""Making, checking, converting and looking at packed data."""
