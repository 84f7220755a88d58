"""The demo: a page on which one asks about a picture and watches the answer being made."""
