"""Turns the weights of one network into those of a supernet: all subnets learn together.

Each step follows the sandwich rule: the largest subnet learns from the labels, or from the network as it was
before; the smallest and a few that are drawn learn from the labels and from the largest. A training is exact
in its seed, and so is one that was interrupted and goes on: what a step draws depends on the seed and on its
number alone, and what the data draw is drawn again on the way to the batch that is next.

Imports `gpu_worker.supernet`. Data: an iterable of batches -> `loop.train` -> steps of `sandwich.Sandwich`,
kept by `kept` -> weights, whose subnets `judge` compares.

Source: the sandwich rule and in-place distillation, Yu and Huang, "Universally Slimmable Networks"
(ICCV '19).
"""
