"""From a model's name and a sentence to an embedding: all that an embedding needs, without data sets, results or plots.

`encoder.py` shows the four choices that an encoder is: a prompt (`prompts.py`), a method (`token_prepending.py`), what
is read where (`pooling.py`) and what is done to it afterwards (`postprocess.py`). Below it stand the model
(`backbone.py`), its tokens (`tokens.py`) and its forward pass (`forward.py`). Read these first.
"""
