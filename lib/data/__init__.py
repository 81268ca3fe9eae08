"""Evaluation data: where it comes from, and the checks it passes before a number is made from it.

Read `sources` first: it finds or fetches the real data, else the sample, and defines `EvaluationData`, the form of
every data set. `sts`, `transfer`, `retrieval` and, for smaller sets, `texts` load them; `files` checks files."""
