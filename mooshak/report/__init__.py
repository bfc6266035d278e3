"""HTML pages: style, plots, templates."""
