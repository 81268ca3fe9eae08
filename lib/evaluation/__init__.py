"""How good embeddings are, item by item. Read `tasks` first: it says what a task is.

`sts`, `transfer` and `retrieval` score the items of one kind of task each; `alignment` (with `vocabulary`) reads
embeddings through the model's unembedding; `intervals` is the one bootstrap, of any of these scores."""
