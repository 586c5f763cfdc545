"""Models of text that are elastic in depth: BERT encoders and rerankers with an exit after each layer.

A model lies in a folder as Hugging Face and sentence-transformers publish it: `config.json`, the tensors, and
for an encoder `modules.json`, which tells how tokens become one vector. Nothing is downloaded.

Imports `gpu_worker.supernet`. `gpu_worker.models.kinds` makes supernets of what is here, by name.
"""
