"""report.html: what a run left, in one page that needs nothing else."""
