"""How good embeddings are, item by item. A task is a data set whose items are scored: a table with a row an item.

`sts`, `transfer` and `retrieval` score the items of one kind of task each; `alignment` (with `vocabulary`) reads
embeddings through the model's unembedding; `intervals` is the one bootstrap, of any of these scores. Read it first."""
