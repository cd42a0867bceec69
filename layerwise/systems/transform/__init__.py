"""Systems that change the weights by layer: prune, merge, tie, quantize, distil."""
