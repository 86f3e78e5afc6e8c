"""Checkpoints in llama.cpp's GGUF files, one file or several, read as if they were a folder.

A file from a stranger is not trusted: sizes, counts and offsets in its header are checked against
the file before anything is allocated (`header`), and every value that the model's config takes from
it has a range (`metadata`). Names and layouts are llama.cpp's; `tensors` and `architectures` turn
them into the parameters of transformers' classes.
"""
