"""What a notebook computes beyond the evaluations, in one or two modules a notebook. Read a notebook first.

`effects` (notebooks 01 and 02) puts variants of a prompt beside each other. `layers` and `context` (03) choose TP's
settings and take TP apart. `key_tokens` and `train_embedder` belong to 04, `cost` and `cost_tables` to 05, `sparse` and
`retrieval` to 06, `concepts` to 07.
Nothing here loads data, draws, or is imported by another room than `lib.run`.
"""
