"""Judge: suites of attacks, sanity checks, result cards."""
