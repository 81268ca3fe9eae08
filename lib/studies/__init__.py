"""What a notebook computes beyond the evaluations, in one or two modules a notebook. Read a notebook first.

`effects` (notebooks 01 and 02) puts variants of a prompt beside each other. `layers` (03) chooses TP's settings and
takes TP apart. `key_tokens` and `train_embedder` belong to 04, `cost` to 05, `retrieval` to 06, `concepts` to 07."""
