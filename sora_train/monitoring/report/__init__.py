"""report.html: charts and samples of a run in one file that needs no network."""
