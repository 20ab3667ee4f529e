"""`ldmq quantize --reconstruct`: what it says, what it leaves, and that an interrupted one goes on."""
