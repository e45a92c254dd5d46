"""An objective: a module from a micro-batch's tensors to its mean loss, and how a batch becomes those tensors."""
