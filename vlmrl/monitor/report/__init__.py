"""report.html: a whole run on one self-contained page."""
