"""A proof before serving: each subnet in place equals the whole network with what was cut taken out.

A module that insertion cannot follow often answers wrong without an error: the label names one subnet, the
answer comes from another. `prove(supernet, example)` finds that out with an oracle that knows neither the
model nor the code that slices. It may import torch, `superserve` and `gpu_worker.supernet`; `absence`,
`rules`, `flow`, `references` and `whole` import nothing of the slicer.

**The claim.** Insertion keeps a copy of the model from before it changed anything. The oracle runs that copy
at full width, in float64. Where a layer has an elastic size, the outputs that a subnet does not keep are
marked as *absent*. Then each operation of torch, however the model came to call it, follows one rule:

- a product or a convolution uses zero for what is absent: the mask at the consumer's input;
- a sum, mean, softmax or norm runs over the elements that are present;
- an elementwise operation is absent where one of its operands is;
- what moves elements (views, reshapes, concatenation, chunks) moves their marks.

So which inputs of a consumer are cut follows from where the elements went, and not from what the slicer
believes. Marks are kept beside each storage, so that views and writes in place need no rule. An operation
without a rule is probed: whatever in its output changes if only absent inputs change is absent; if something
depends on both, it cannot be judged. A product of present with absent elements has no meaning: a fused layer
(q, k, v; gate, up) was cut in one piece, and is refused.

BatchNorms get the subnet's own statistics, or invented ones that differ from norm to norm; parameters that
are all equal, behind which a fault could hide, get noise. A block that is left out gives its input, or what
its stage declares; of one that appends to its input (a dense block), what it appends is absent.

**The comparison.** A copy of the supernet runs the same subnet. Each layer's output must have as many
elements as the oracle's has present ones, and the same values, in order; the first layer that differs is
named. At last the supernet itself, as it is, has to answer like its copy: slices of weights that have been
replaced do not.

**What the whole network shows beside that.** A block that is never called as a module cannot be left out. A
block whose output is added to its own input by its caller must give zero and not its input. A parameter of an
elastic layer that is used outside of the layer's forward is used whole. A sum with something other than an
elementwise step, a norm or a view between it and the block is not seen: what the stage declares is believed.

**What is not proved.** That subnets are accurate; that a device computes right; paths of the code that the
example does not take; subnets beside the sample, in which each size and each depth occurs. Layers with
another rule (recurrent ones, kernel transforms) bring a plain reference: `gpu_worker.proof.references`.

Data: example, `Original`, sizes -> `whole.WholeNetwork` -> records; the supernet's copy -> records; `prove`
compares.
"""
