"""Evaluation data: where it comes from, and the checks it passes before a number is made from it.

Read `sources` first. It finds the real data or the sample that stands in for it, and defines `EvaluationData`, the one
form in which every data set is handed on. `sts`, `transfer` and `retrieval` each hold a table of their files with the
pinned counts and one loader; `texts` holds smaller sets. `files` reads and checks files, `download` fetches them.
"""
